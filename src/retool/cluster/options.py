"""From a recipe to verl's options: one line an option, with the recipe's field that sets it.

Nothing here imports verl. What has no line is verl's default, and can be given as ``--verl key=value``; a key that a
field of the recipe sets is refused there, so that ``config.toml`` says what ran.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.errors import ConfigError

JOBS = ("sft", "rl", "evaluate")
NANO = Path(__file__).parent.parent / "nano"
LOOPS = Path(__file__).parent / "agent_loops.yaml"
PLAIN_VALUE = re.compile(r"[\w./:-]+")
"""What Hydra reads as a string without quotes."""


@dataclass(frozen=True)
class Job:
    """What is launched."""

    name: str
    """One of ``JOBS``."""
    recipe: Recipe
    folder: Path
    """The run folder, absolute: workers have working folders of their own."""

    @property
    def state(self) -> Path:
        """verl's own part of the run folder."""
        return self.folder / "verl"


Getter = Callable[[Job], Any]


@dataclass(frozen=True)
class Option:
    """One option of verl."""

    key: str
    field: str
    """The recipe's field that sets it; empty: our own choice, which ``--verl`` may change."""
    get: Getter
    when: Callable[[Job], bool] = lambda job: True
    """Whether it is given at all."""


def same(key: str, field: str, when: Callable[[Job], bool] = lambda job: True) -> Option:
    """An option that is the field as it stands."""

    def get(job: Job) -> Any:
        value: Any = job.recipe
        for part in field.split("."):
            value = getattr(value, part)
        return value

    return Option(key, field, get, when)


def chosen(key: str, value: Any, when: Callable[[Job], bool] = lambda job: True) -> Option:
    return Option(key, "", lambda job: value, when)


# --- what the fields mean to verl -------------------------------------------------------------------------------------

ESTIMATORS = {
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "rloo": "rloo",
    "reinforce_pp": "reinforce_plus_plus_baseline",
    "gae": "gae",
}
LOSSES = {"ppo_clip": "vanilla", "gspo": "gspo", "cispo": "cispo"}
AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
KL_ESTIMATORS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


def _has_critic(job: Job) -> bool:
    return job.name == "rl" and job.recipe.rl.has_critic


def _has_reference(job: Job) -> bool:
    return job.recipe.rl.kl.place != "off"


def _has_lora(job: Job) -> bool:
    return job.recipe.model.lora.rank > 0


def model_path(recipe: Recipe) -> str:
    """A folder's absolute path, or a hub name as it stands."""
    return _place(str(NANO) if recipe.model.path == "nano" else recipe.model.path)


def _place(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _tokenizer(job: Job) -> str | None:
    return _place(job.recipe.model.tokenizer) if job.recipe.model.tokenizer else None


def _targets(job: Job) -> str | list[str]:
    targets = job.recipe.model.lora.targets
    return targets[0] if targets == ["all-linear"] else targets


def _device(job: Job) -> str:
    return "cpu" if job.recipe.model.device == "cpu" else "cuda"


def _address(job: Job) -> str:
    """``local``: a Ray of the run's own, also where another one runs on this machine."""
    return job.recipe.cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def _logprob_tokens(job: Job) -> int:
    return job.recipe.cluster.logprob_tokens or job.recipe.rl.micro_batch_tokens


def _threshold(job: Job) -> float | str:
    correction = job.recipe.rl.correction
    return correction.high if correction.mode == "truncate" else f"{correction.low:g}_{correction.high:g}"


def _kept(job: Job) -> int | None:
    return job.recipe.run.keep_checkpoints or None


def _steps(job: Job) -> int:
    return job.recipe.rl.steps if job.name == "rl" else 1


def _validates(job: Job) -> bool:
    return job.name == "evaluate" or job.recipe.rl.eval_every > 0


def optimiser(at: str, field: str, when: Callable[[Job], bool] = lambda job: True) -> tuple[Option, ...]:
    """An optimiser's options; sft, the actor and the critic have one each."""
    return (
        same(f"{at}.lr", f"{field}.lr", when),
        same(f"{at}.betas", f"{field}.betas", when),
        same(f"{at}.weight_decay", f"{field}.weight_decay", when),
        same(f"{at}.lr_warmup_steps", f"{field}.warmup_steps", when),
        same(f"{at}.lr_scheduler_type", f"{field}.schedule", when),
        same(f"{at}.min_lr_ratio", f"{field}.final_lr_share", when),
        same(f"{at}.clip_grad", f"{field}.grad_clip", when),
    )


def model(at: str, when: Callable[[Job], bool] = lambda job: True) -> tuple[Option, ...]:
    """A model's options."""
    return (
        Option(f"{at}.path", "model.path", lambda job: model_path(job.recipe), when),
        Option(f"{at}.tokenizer_path", "model.tokenizer", _tokenizer, when),
        chosen(f"{at}.use_remove_padding", True, when),
        same(f"{at}.enable_gradient_checkpointing", "engine.gradient_checkpointing", when),
    )


# --- the tables -------------------------------------------------------------------------------------------------------

_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

RL: tuple[Option, ...] = (
    # data
    Option("data.train_files", "data.train", lambda job: [str(job.state / "train.parquet")]),
    Option("data.val_files", "data.test", lambda job: [str(job.state / "val.parquet")]),
    same("data.train_batch_size", "rl.prompts"),
    Option(
        "data.max_prompt_length",
        "rollout.max_context",
        lambda job: job.recipe.rollout.max_context - job.recipe.rollout.max_response_tokens,
    ),
    same("data.max_response_length", "rollout.max_response_tokens"),
    same("data.seed", "run.seed"),
    chosen("data.shuffle", False),  # the file is in the order of the local engine's stream already
    chosen("data.dataloader_num_workers", 0),
    # algorithm
    Option("algorithm.adv_estimator", "rl.advantage", lambda job: ESTIMATORS[job.recipe.rl.advantage]),
    Option("algorithm.norm_adv_by_std_in_grpo", "rl.advantage", lambda job: job.recipe.rl.advantage != "dr_grpo"),
    same("algorithm.gamma", "rl.critic.gamma"),
    same("algorithm.lam", "rl.critic.lam"),
    Option("algorithm.use_kl_in_reward", "rl.kl.place", lambda job: job.recipe.rl.kl.place == "reward"),
    Option("algorithm.kl_penalty", "rl.kl.estimator", lambda job: KL_ESTIMATORS[job.recipe.rl.kl.estimator]),
    Option(
        "algorithm.kl_ctrl.kl_coef",
        "rl.kl.coef",
        lambda job: job.recipe.rl.kl.coef if job.recipe.rl.kl.place == "reward" else 0.0,
    ),
    same("algorithm.filter_groups.enable", "rl.dynamic_sampling.enabled"),
    chosen("algorithm.filter_groups.metric", "acc"),
    Option(
        "algorithm.rollout_correction.rollout_is",
        "rl.correction.level",
        lambda job: None if job.recipe.rl.correction.level == "off" else job.recipe.rl.correction.level,
    ),
    Option("algorithm.rollout_correction.rollout_is_threshold", "rl.correction.high", _threshold),
    # the actor
    *model("actor_rollout_ref.model"),
    same("actor_rollout_ref.model.lora_rank", "model.lora.rank", _has_lora),
    Option(
        "actor_rollout_ref.model.lora_alpha", "model.lora.alpha", lambda job: job.recipe.model.lora.alpha, _has_lora
    ),
    Option("actor_rollout_ref.model.target_modules", "model.lora.targets", _targets, _has_lora),
    chosen(f"{_ACTOR}.strategy", "fsdp2"),
    Option(
        f"{_ACTOR}.ppo_mini_batch_size",
        "rl.minibatch_prompts",
        lambda job: job.recipe.rl.minibatch_prompts or job.recipe.rl.prompts,
    ),
    chosen(f"{_ACTOR}.use_dynamic_bsz", True),
    same(f"{_ACTOR}.ppo_max_token_len_per_gpu", "rl.micro_batch_tokens"),
    same(f"{_ACTOR}.ulysses_sequence_parallel_size", "cluster.sequence_parallel"),
    Option(f"{_ACTOR}.policy_loss.loss_mode", "rl.loss", lambda job: LOSSES[job.recipe.rl.loss]),
    Option(f"{_ACTOR}.loss_agg_mode", "rl.aggregation", lambda job: AGGREGATIONS[job.recipe.rl.aggregation]),
    Option(
        f"{_ACTOR}.loss_scale_factor",
        "rollout.max_response_tokens",
        lambda job: job.recipe.rollout.max_response_tokens,
        lambda job: job.recipe.rl.aggregation == "constant",
    ),
    same(f"{_ACTOR}.clip_ratio_low", "rl.clip_low"),
    same(f"{_ACTOR}.clip_ratio_high", "rl.clip_high"),
    same(f"{_ACTOR}.clip_ratio_c", "rl.dual_clip"),
    same(f"{_ACTOR}.entropy_coeff", "rl.entropy_bonus"),
    Option(f"{_ACTOR}.use_kl_loss", "rl.kl.place", lambda job: job.recipe.rl.kl.place == "loss"),
    Option(
        f"{_ACTOR}.kl_loss_coef",
        "rl.kl.coef",
        lambda job: job.recipe.rl.kl.coef if job.recipe.rl.kl.place == "loss" else 0.0,
    ),
    Option(f"{_ACTOR}.kl_loss_type", "rl.kl.estimator", lambda job: KL_ESTIMATORS[job.recipe.rl.kl.estimator]),
    *optimiser(f"{_ACTOR}.optim", "rl.optim"),
    same(f"{_ACTOR}.fsdp_config.param_offload", "cluster.offload"),
    same(f"{_ACTOR}.fsdp_config.optimizer_offload", "cluster.offload"),
    # the reference, where there is a KL penalty
    chosen(f"{_REF}.strategy", "fsdp2", _has_reference),
    Option(f"{_REF}.log_prob_max_token_len_per_gpu", "cluster.logprob_tokens", _logprob_tokens, _has_reference),
    same(f"{_REF}.fsdp_config.param_offload", "cluster.offload", _has_reference),
    # sampling
    same(f"{_ROLLOUT}.name", "cluster.rollout"),
    same(f"{_ROLLOUT}.tensor_model_parallel_size", "cluster.tensor_parallel"),
    same(f"{_ROLLOUT}.gpu_memory_utilization", "cluster.gpu_memory_share"),
    same(f"{_ROLLOUT}.max_model_len", "rollout.max_context"),
    same(f"{_ROLLOUT}.max_num_seqs", "engine.max_live"),
    same(f"{_ROLLOUT}.n", "rl.group_size"),
    same(f"{_ROLLOUT}.temperature", "rollout.temperature"),
    same(f"{_ROLLOUT}.top_p", "rollout.top_p"),
    Option(f"{_ROLLOUT}.top_k", "rollout.top_k", lambda job: job.recipe.rollout.top_k or -1),
    Option(f"{_ROLLOUT}.log_prob_max_token_len_per_gpu", "cluster.logprob_tokens", _logprob_tokens),
    same(f"{_ROLLOUT}.val_kwargs.n", "eval.k"),
    same(f"{_ROLLOUT}.val_kwargs.temperature", "eval.temperature"),
    same(f"{_ROLLOUT}.val_kwargs.top_p", "eval.top_p"),
    Option(f"{_ROLLOUT}.val_kwargs.do_sample", "eval.temperature", lambda job: job.recipe.eval.temperature > 0),
    chosen(f"{_ROLLOUT}.skip_tokenizer_init", False),  # SGLang finds stop strings only with its tokenizer
    Option(f"{_ROLLOUT}.agent.default_agent_loop", "rollout.format", lambda job: "retool"),
    Option(f"{_ROLLOUT}.agent.agent_loop_config_path", "rollout.format", lambda job: str(LOOPS)),
    same(f"{_ROLLOUT}.agent.num_workers", "cluster.agent_workers"),
    # the critic
    Option("critic.enable", "rl.advantage", _has_critic),
    *model("critic.model", _has_critic),
    chosen("critic.strategy", "fsdp2", _has_critic),
    Option(
        "+critic.ppo_infer_max_token_len_per_gpu",  # all that verl's trainer reads, for learning too
        "cluster.critic_tokens",
        lambda job: job.recipe.cluster.critic_tokens or job.recipe.rl.micro_batch_tokens,
        _has_critic,
    ),
    Option(
        "critic.fsdp.ulysses_sequence_parallel_size",
        "cluster.critic_sequence_parallel",
        lambda job: job.recipe.cluster.critic_sequence_parallel or job.recipe.cluster.sequence_parallel,
        _has_critic,
    ),
    same("critic.cliprange_value", "rl.critic.value_clip", _has_critic),
    same("critic.ppo_epochs", "rl.critic.epochs", _has_critic),
    *optimiser("critic.optim", "rl.critic.optim", _has_critic),
    same("critic.fsdp.param_offload", "cluster.offload", _has_critic),
    same("critic.fsdp.optimizer_offload", "cluster.offload", _has_critic),
    # reward: our agent loop grades; this is for verl's own loops on our data
    chosen("reward.custom_reward_function.path", "pkg://retool.cluster.reward"),
    chosen("reward.custom_reward_function.name", "compute_score"),
    chosen("reward.num_workers", 1),
    # the run
    same("trainer.nnodes", "cluster.nodes"),
    same("trainer.n_gpus_per_node", "cluster.gpus_per_node"),
    Option("+ray_kwargs.ray_init.address", "cluster.address", _address),
    Option("trainer.device", "model.device", _device),
    Option("trainer.total_training_steps", "rl.steps", _steps),
    Option("trainer.total_epochs", "rl.steps", lambda job: _steps(job) + 1),  # no end before the last step's
    Option(
        "trainer.critic_warmup",
        "rl.critic.warmup_steps",
        # verl counts from 1, and lets the actor learn in the step of this number
        lambda job: job.recipe.rl.critic.warmup_steps + 1 if job.recipe.rl.critic.warmup_steps else 0,
        _has_critic,
    ),
    Option("trainer.save_freq", "rl.save_every", lambda job: job.recipe.rl.save_every or _steps(job)),
    Option("trainer.test_freq", "rl.eval_every", lambda job: job.recipe.rl.eval_every or -1),
    Option("trainer.val_before_train", "rl.eval_every", _validates),
    Option("trainer.val_only", "rl.steps", lambda job: job.name == "evaluate"),
    Option("trainer.default_local_dir", "run.name", lambda job: str(job.state)),
    Option("trainer.max_actor_ckpt_to_keep", "run.keep_checkpoints", _kept),
    Option("trainer.max_critic_ckpt_to_keep", "run.keep_checkpoints", _kept, _has_critic),
    Option("trainer.resume_mode", "run.resume", lambda job: "auto" if job.name == "rl" else "disable"),
    Option("trainer.logger", "run.trackers", lambda job: ["console", "file"]),
    same("trainer.project_name", "run.project"),
    same("trainer.experiment_name", "run.name"),
)
"""``verl.trainer.main_ppo`` (``ppo_trainer.yaml``): rl and evaluate."""


CONFIGS = {"sft": "sft_trainer_engine", "rl": "ppo_trainer", "evaluate": "ppo_trainer"}
"""verl's configuration of each job."""


def table(name: str) -> tuple[Option, ...]:
    """A job's table."""
    if name == "sft":
        from retool.cluster.sft import SFT  # it is made of what stands here

        return SFT
    return RL


# --- what verl cannot do ----------------------------------------------------------------------------------------------

Refusal = tuple[str, Callable[[Job], bool], str]

REFUSED: tuple[Refusal, ...] = (
    ("run.deterministic", lambda job: job.recipe.run.deterministic, "verl's samplers share batches; set it to false"),
    ("model.random_init", lambda job: bool(job.recipe.model.random_init), "verl loads a model; set it to {}"),
    (
        "model.dtype",
        lambda job: job.recipe.model.dtype == "float32" and job.recipe.model.device != "cpu",
        "verl keeps float32 masters and computes in bfloat16; set it to 'auto'",
    ),
    ("rl.optim.name", lambda job: job.recipe.rl.optim.name != "adamw", "verl has no Muon; set it to 'adamw'"),
    (
        "rl.optim.schedule",
        lambda job: job.recipe.rl.optim.schedule == "linear",
        "verl has none such; set it to 'constant' or 'cosine'",
    ),
    (
        "rl.critic.optim.name",
        lambda job: _has_critic(job) and job.recipe.rl.critic.optim.name != "adamw",
        "verl has no Muon; set it to 'adamw'",
    ),
    (
        "rl.critic.optim.schedule",
        lambda job: _has_critic(job) and job.recipe.rl.critic.optim.schedule == "linear",
        "verl has none such; set it to 'constant' or 'cosine'",
    ),
    (
        "rl.critic.whiten_advantages",
        lambda job: _has_critic(job) and not job.recipe.rl.critic.whiten_advantages,
        "verl always whitens GAE's; set it to true",
    ),
    (
        "rl.critic.whiten_returns",
        lambda job: _has_critic(job) and job.recipe.rl.critic.whiten_returns,
        "verl has none such; set it to false",
    ),
    ("rl.overlong.filter", lambda job: job.recipe.rl.overlong.filter, "verl has none such; set it to false"),
    (
        "rl.dynamic_sampling.keep_surplus",
        lambda job: job.recipe.rl.dynamic_sampling.keep_surplus,
        "verl's synchronous trainer throws the surplus away; set it to false",
    ),
    (
        "rl.tail.oversample",
        lambda job: job.recipe.rl.tail.oversample > 1,
        "verl's own way is --verl trainer.v1.trainer_mode=colocate_async; set it to 1",
    ),
)
"""A field, whether the recipe sets it to what verl lacks, and why and what to do."""


def refuse(job: Job) -> None:
    """Raises ConfigError: the recipe asks for what this engine cannot do."""
    for field, asked, reason in refused(job.name):
        if asked(job):
            value: Any = job.recipe
            for part in field.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{field} = {json.dumps(value)} with --engine verl: {reason}, or use --engine local")


def refused(name: str) -> tuple[Refusal, ...]:
    """What a job refuses."""
    if name == "sft":
        from retool.cluster.sft import REFUSED_SFT

        return REFUSED_SFT
    return REFUSED if name == "rl" else REFUSED[:3]


NOTES: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (
        lambda job: job.name == "rl" and job.recipe.rl.dynamic_sampling.enabled,
        "rl.dynamic_sampling.max_rounds does not bound verl: it draws tasks until the batch is full",
    ),
    (
        lambda job: job.name == "rl" and job.recipe.rl.compares_groups,
        "verl's loss divides by the tokens of groups of equal rewards too; the local engine leaves them out",
    ),
)
"""Where a run on verl differs from one on the local engine: shown, not refused."""


def notes_of(job: Job) -> list[str]:
    return [note for concerns, note in NOTES if concerns(job)]


# --- putting them together --------------------------------------------------------------------------------------------


def hydra_value(value: Any) -> str:
    """``value`` as Hydra's override grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    if isinstance(value, str) and not PLAIN_VALUE.fullmatch(value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def _key_of(override: str) -> str:
    key, equals, _ = override.partition("=")
    key = key.strip().lstrip("+~")
    if not key or not (equals or override.startswith("~")):
        raise ConfigError(f"--verl {override!r}: write key=value, e.g. actor_rollout_ref.rollout.enforce_eager=true")
    return key


def options_of(job: Job) -> list[tuple[Option, Any]]:
    """The job's lines of the table, with their values."""
    return [(option, option.get(job)) for option in table(job.name) if option.when(job)]


def overrides_of(job: Job, extra: Sequence[str] = ()) -> list[str]:
    """verl's command line: the table's options, then ``extra``, which may replace those that no field sets.

    Raises:
        ConfigError: the recipe asks for what verl cannot do, or ``extra`` for what a field sets.
    """
    refuse(job)
    given = {_key_of(override): override for override in extra}
    lines = []
    for option, value in options_of(job):
        override = given.get(_key_of(f"{option.key}="))
        if override is None:
            lines.append(f"{option.key}={hydra_value(value)}")
        elif option.field:
            raise ConfigError(f"--verl {override}: the recipe sets that; give {option.field}=… instead")
    return [*lines, *extra]


def command_of(job: Job, overrides: Sequence[str]) -> list[str]:
    """What the launcher gives to Python."""
    return ["-m", "retool.cluster.main", str(job.folder), job.name, *overrides]


def describe(name: str, recipe: Recipe, extra: Sequence[str] = ()) -> list[str]:
    """For people: each of verl's options with the field that sets it, then the command that would run.

    Raises:
        ConfigError: as ``overrides_of``.
    """
    job = Job(name, recipe, (Path(recipe.run.out) / recipe.run.name).resolve())
    overrides = overrides_of(job, extra)
    fields = {option.key: option.field or "chosen for every run" for option, _ in options_of(job)}
    lines = [f"verl's options ({CONFIGS[name]}.yaml), and the recipe's field that sets each:"]
    width = max(map(len, overrides))
    for override in overrides:
        known = fields.get(override.partition("=")[0]) if override not in extra else None
        lines.append(f"  {override:{width}}  {known or '--verl'}")
    lines += [f"note: {note}" for note in notes_of(job)]
    return [
        *lines,
        "",
        "the command, once the run folder has its data:",
        f"  python {shlex.join(command_of(job, overrides))}",
    ]
