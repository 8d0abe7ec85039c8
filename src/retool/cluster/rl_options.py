"""verl's options for RL and evaluation: one line an option, with the recipe's field that sets it."""

from __future__ import annotations

import os
from pathlib import Path

from retool.cluster.option import Job, Option, chosen, has_critic, lora, model, optimiser, room_for, same

LOOPS = Path(__file__).parent / "agent_loops.yaml"

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


def _has_reference(job: Job) -> bool:
    return job.recipe.rl.kl.place != "off"


def _device(job: Job) -> str:
    return "cpu" if job.recipe.model.device == "cpu" else "cuda"


def _address(job: Job) -> str:
    """``local``: a Ray of the run's own, also where another one runs on this machine."""
    return job.recipe.cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def _logprob_tokens(job: Job) -> int:
    recipe = job.recipe
    tokens = recipe.cluster.logprob_tokens or recipe.rl.micro_batch_tokens
    return room_for(tokens, recipe.rollout.max_context, recipe.cluster.sequence_parallel)


def _actor_tokens(job: Job) -> int:
    recipe = job.recipe
    return room_for(recipe.rl.micro_batch_tokens, recipe.rollout.max_context, recipe.cluster.sequence_parallel)


def _critic_parallel(job: Job) -> int:
    return job.recipe.cluster.critic_sequence_parallel or job.recipe.cluster.sequence_parallel


def _critic_tokens(job: Job) -> int:
    tokens = job.recipe.cluster.critic_tokens or job.recipe.rl.micro_batch_tokens
    return room_for(tokens, job.recipe.rollout.max_context, _critic_parallel(job))


def _threshold(job: Job) -> float | str:
    correction = job.recipe.rl.correction
    return correction.high if correction.mode == "truncate" else f"{correction.low:g}_{correction.high:g}"


def _kept(job: Job) -> int | None:
    return job.recipe.run.keep_checkpoints or None


def _steps(job: Job) -> int:
    return job.recipe.rl.steps if job.name == "rl" else 1


def _validates(job: Job) -> bool:
    return job.name == "evaluate" or job.recipe.rl.eval_every > 0


# --- the table --------------------------------------------------------------------------------------------------------

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
    # a group that was lost whole is drawn again, where verl draws more than once a step
    same("trainer.v1.sampler.sync_refill_failed_groups", "rl.dynamic_sampling.enabled"),
    Option(
        "algorithm.rollout_correction.rollout_is",
        "rl.correction.level",
        lambda job: None if job.recipe.rl.correction.level == "off" else job.recipe.rl.correction.level,
    ),
    Option("algorithm.rollout_correction.rollout_is_threshold", "rl.correction.high", _threshold),
    # the actor
    *model("actor_rollout_ref.model"),
    *lora("actor_rollout_ref.model"),
    chosen(f"{_ACTOR}.strategy", "fsdp2"),
    Option(
        f"{_ACTOR}.ppo_mini_batch_size",
        "rl.minibatch_prompts",
        lambda job: job.recipe.rl.minibatch_prompts or job.recipe.rl.prompts,
    ),
    chosen(f"{_ACTOR}.use_dynamic_bsz", True),
    Option(f"{_ACTOR}.ppo_max_token_len_per_gpu", "rl.micro_batch_tokens", _actor_tokens),
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
    Option(f"{_ROLLOUT}.val_kwargs.top_k", "rollout.top_k", lambda job: job.recipe.rollout.top_k or -1),
    Option(f"{_ROLLOUT}.val_kwargs.do_sample", "eval.temperature", lambda job: job.recipe.eval.temperature > 0),
    chosen(f"{_ROLLOUT}.skip_tokenizer_init", False),  # SGLang finds stop strings only with its tokenizer
    chosen(f"{_ROLLOUT}.agent.default_agent_loop", "retool"),
    chosen(f"{_ROLLOUT}.agent.agent_loop_config_path", str(LOOPS)),
    same(f"{_ROLLOUT}.agent.num_workers", "cluster.agent_workers"),
    # the critic
    Option("critic.enable", "rl.advantage", has_critic),
    *model("critic.model", has_critic),
    chosen("critic.strategy", "fsdp2", has_critic),
    Option(
        "+critic.ppo_infer_max_token_len_per_gpu",  # all that verl's trainer reads, for learning too
        "cluster.critic_tokens",
        _critic_tokens,
        has_critic,
    ),
    Option(
        "critic.fsdp.ulysses_sequence_parallel_size",
        "cluster.critic_sequence_parallel",
        _critic_parallel,
        has_critic,
    ),
    same("critic.cliprange_value", "rl.critic.value_clip", has_critic),
    same("critic.ppo_epochs", "rl.critic.epochs", has_critic),
    *optimiser("critic.optim", "rl.critic.optim", has_critic),
    same("critic.fsdp.param_offload", "cluster.offload", has_critic),
    same("critic.fsdp.optimizer_offload", "cluster.offload", has_critic),
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
        has_critic,
    ),
    Option("trainer.save_freq", "rl.save_every", lambda job: job.recipe.rl.save_every or _steps(job)),
    Option("trainer.test_freq", "rl.eval_every", lambda job: job.recipe.rl.eval_every or -1),
    Option("trainer.val_before_train", "rl.eval_every", _validates),
    Option("trainer.val_only", "rl.steps", lambda job: job.name == "evaluate"),
    Option("trainer.default_local_dir", "run.name", lambda job: str(job.state)),
    Option("trainer.max_actor_ckpt_to_keep", "run.keep_checkpoints", _kept),
    Option("trainer.max_critic_ckpt_to_keep", "run.keep_checkpoints", _kept, has_critic),
    Option("trainer.resume_mode", "run.resume", lambda job: "auto" if job.name == "rl" else "disable"),
    Option("trainer.logger", "run.trackers", lambda job: ["console", "file"]),
    same("trainer.project_name", "run.project"),
    same("trainer.experiment_name", "run.name"),
)
"""``verl.trainer.main_ppo`` (``ppo_trainer.yaml``): rl and evaluate."""
