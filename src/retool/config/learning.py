"""The sections of what is learnt and how: optimisers, supervised fine-tuning, reinforcement learning, its health."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retool.config.section import Beta, Section


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the hidden matrices, AdamW on embeddings and norms."""
    lr: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    muon_lr: float = Field(default=0.02, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up, to ``final_lr_share`` at the last step."""
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    grad_clip: float = Field(default=1.0, gt=0)


class SFTConfig(Section):
    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0: as many as ``epochs`` of the training file need."""
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Conversations a step."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    max_tokens: int = Field(default=2048, ge=8)
    """Longer conversations are left out and counted."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between in-loop losses on held-out conversations; 0: only at the end."""
    save_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    optim: OptimConfig = Field(default_factory=OptimConfig)


class CriticConfig(Section):
    """PPO's value model: the actor's architecture and start, with a value head."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE's γ and λ."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the critic alone learns."""
    epochs: int = Field(default=1, ge=1)
    """How often the critic goes over a step's batch."""
    value_clip: float = Field(default=0.5, gt=0)
    """How far a value may move from what it was when the step began."""
    whiten_advantages: bool = True
    """Advantages of a step get mean 0 and standard deviation 1."""
    whiten_returns: bool = False
    """The critic learns returns less their running mean, by their running standard deviation."""
    optim: OptimConfig = Field(default_factory=OptimConfig)


class KLConfig(Section):
    """A penalty on leaving the reference, the model with which the run began."""

    place: Literal["off", "loss", "reward"] = "off"
    coef: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    estimator: Literal["k1", "k2", "k3"] = "k3"


class DynamicSamplingConfig(Section):
    """DAPO's: groups that are all right or all wrong are replaced by those of new tasks until the batch is full."""

    enabled: bool = False
    max_rounds: int = Field(default=8, ge=1)
    """Draws of ``rl.prompts`` tasks in a step; after them the step goes on with what it has."""
    keep_surplus: bool = False
    """Groups that the batch has no room for are learnt from in the next step, instead of being thrown away."""


class OverlongConfig(Section):
    """DAPO's care for trajectories that are too long."""

    buffer_share: float = Field(default=0.0, ge=0, le=1)
    """The last share of ``rollout.max_response_tokens``, in which the punishment grows to ``penalty``; 0: none."""
    penalty: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    filter: bool = False
    """Trajectories that ran out of room are not learnt from; in their group's mean they stay."""


class CorrectionConfig(Section):
    """Importance weights for the gap between the sampler and the learner at the beginning of a step."""

    level: Literal["off", "token", "sequence"] = "off"
    mode: Literal["truncate", "mask"] = "truncate"
    """truncate: weights above ``high`` become ``high``. mask: weights outside [``low``, ``high``] become 0."""
    high: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    low: float = Field(default=0.5, ge=0, le=1)


class TailConfig(Section):
    """What to do about the few trajectories that take longest."""

    oversample: float = Field(default=1.0, ge=1, le=8)
    """Groups begun, as a multiple of ``rl.prompts``; the rollout ends when ``rl.prompts`` of them are done."""
    partial: bool = False
    """What was not done goes on in the next step, its tokens and log-probabilities kept. False: it is thrown away,
    which makes the batch prefer short answers."""


Algorithm = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo"]
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"dynamic_sampling": {"enabled": True}, "overlong": {"buffer_share": 0.2}},
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "constant", "clip_high": 0.2},
    "gspo": {"loss": "gspo", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "rloo"},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "ppo": {"advantage": "gae"},
}
"""What each name means, where it differs from the settings' defaults (docs/algorithms.md says from which paper). A
recipe may set any of it otherwise."""


class RLConfig(Section):
    algorithm: Algorithm = "grpo"
    """A name for a choice of the settings below (``ALGORITHMS``); each of them can still be given by itself."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "gae"] = "grpo"
    """gae: a critic learns too; group_size may be 1."""
    loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How tokens' losses become one. constant: divided by trajectories × ``rollout.max_response_tokens``."""
    steps: int = Field(default=40, ge=1)
    prompts: int = Field(default=32, ge=1)
    """Tasks a step."""
    group_size: int = Field(default=8, ge=1)
    """Trajectories a task (GRPO's G, at least 2)."""
    minibatch_prompts: int = Field(default=0, ge=0)
    """Tasks an optimiser step; 0: all of them, strictly on-policy."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    clip_low: float = Field(default=0.2, gt=0, le=1)
    clip_high: float = Field(default=0.28, gt=0)
    dual_clip: float = Field(default=10.0, gt=1)
    """Of ppo_clip alone."""
    entropy_bonus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The mean entropy of a token's distribution, times this, is added to what is maximised."""
    reward: str = Field(default="paper", min_length=1)
    """paper: +1 for a right final answer, −1 otherwise. verl: a wrong one gets up to −0.6 for its calls. Or a function
    of your own, as ``package.module:function``, which takes a graded trajectory and returns a number."""
    grading: Literal["strict", "lenient"] = "strict"
    """strict: the answer is the last ``\\boxed{}`` of the last turn. lenient: where there is none, one from an earlier
    turn, an ``<answer>``, "the answer is …", or the last number."""
    eval_every: int = Field(default=0, ge=0)
    eval_size: int = Field(default=120, ge=1)
    eval_split: Literal["dev", "test"] = "dev"
    """What the evaluations during training read."""
    save_every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    kl: KLConfig = Field(default_factory=KLConfig)
    dynamic_sampling: DynamicSamplingConfig = Field(default_factory=DynamicSamplingConfig)
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)
    tail: TailConfig = Field(default_factory=TailConfig)

    @model_validator(mode="before")
    @classmethod
    def _named_algorithm(cls, given: Any) -> Any:
        """The algorithm's settings, where they are not given themselves."""
        name = given.get("algorithm", "grpo") if isinstance(given, dict) else None
        return _fill(given, ALGORITHMS.get(name, {})) if isinstance(name, str) else given

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def compares_groups(self) -> bool:
        """Whether a group of equal rewards teaches nothing."""
        return self.advantage in ("grpo", "dr_grpo", "rloo")

    @model_validator(mode="after")
    def _compares(self) -> RLConfig:
        if self.group_size < 2 and (not self.has_critic or self.dynamic_sampling.enabled):
            what = "rl.dynamic_sampling" if self.has_critic else self.advantage
            raise ValueError(
                f"rl.group_size = {self.group_size}: {what} compares a task's trajectories; give at least 2"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> RLConfig:
        if self.minibatch_prompts and self.prompts % self.minibatch_prompts:
            raise ValueError(
                f"rl.minibatch_prompts = {self.minibatch_prompts} does not divide rl.prompts = {self.prompts}: "
                "choose a divisor, or 0 for one optimiser step"
            )
        return self

    @model_validator(mode="after")
    def _has_a_rest(self) -> RLConfig:
        if self.tail.partial and self.tail.oversample == 1:
            raise ValueError("rl.tail.partial = true: with rl.tail.oversample = 1 nothing is left over; give more")
        if self.has_critic and self.critic.warmup_steps >= self.steps:
            raise ValueError(
                f"rl.critic.warmup_steps = {self.critic.warmup_steps}: all rl.steps = {self.steps} would be warm-up; "
                "give fewer"
            )
        return self


def _fill(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``given`` with those of ``defaults`` that it leaves out, section by section."""
    filled = dict(given)
    for key, value in defaults.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _fill(filled[key], value)
    return filled


class HealthConfig(Section):
    """What the checks of each step take for unhealthy; docs/health.md tells what each alarm usually means."""

    stop_on: list[str] = Field(default_factory=list)
    """Alarms that end the run, by name."""
    window: int = Field(default=5, ge=1)
    """Steps over which a step is judged: a mean of so many for shares, a median for spikes."""
    call_rate_low: float = Field(default=0.02, ge=0, lt=0.2)
    """``no_calls``: the mean call rate fell below this after it was above five times this."""
    malformed_high: float = Field(default=0.3, ge=0, le=1)
    entropy_low: float = Field(default=0.01, ge=0)
    entropy_high: float = Field(default=5.0, gt=0)
    """Nats."""
    gap_high: float = Field(default=0.05, gt=0)
    """Mean |learner − sampler| log-probability."""
    zero_variance_high: float = Field(default=0.9, ge=0, le=1)
    cut_high: float = Field(default=0.5, ge=0, le=1)
    infra_high: float = Field(default=0.05, ge=0, le=1)
    """Share of a step's trajectories."""
    spike: float = Field(default=10.0, gt=1)
    """A gradient norm over so many times the window's median."""
    max_skipped: int = Field(default=3, ge=1)
    """Steps in a row without a finite gradient after which the run ends."""

    @field_validator("stop_on")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in ALARMS:
                raise ValueError(f"health.stop_on holds {name!r}: choose among {', '.join(ALARMS)}")
        return names


ALARMS = (
    "no_calls",
    "malformed",
    "entropy_collapse",
    "entropy_explosion",
    "logprob_gap",
    "zero_variance",
    "cut_short",
    "infra",
    "gradient_spike",
    "not_finite",
)
"""The names of the checks of ``retool.health``."""
