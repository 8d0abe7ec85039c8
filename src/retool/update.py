"""How a batch changes the weights: advantages, then one optimiser step for each mini-batch of tasks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retool.algo import advantages as adv
from retool.algo.batch import MicroBatch, Sample
from retool.algo.losses import PolicyLoss, cispo, gspo, importance_weights, kl_penalty, ppo_clip, value_loss
from retool.config import Recipe, RLConfig
from retool.engine.critic import Critic, token_values
from retool.engine.learner import Learner, Loss, Outputs, policy_forward
from retool.engine.lora import has_lora, without_lora
from retool.errors import ConfigError
from retool.metrics import CUT_SHORT
from retool.types import Trajectory, TrajectoryGroup

GROUP_METHODS = {"grpo": adv.grpo, "dr_grpo": adv.dr_grpo, "rloo": adv.rloo}


@dataclass
class Lesson:
    """A trajectory, and what is learnt from it."""

    trajectory: Trajectory
    group: int
    sample: Sample
    penalty: float = 0.0
    """For leaving the reference, over all its tokens."""

    @property
    def score(self) -> float:
        return self.trajectory.reward - self.penalty


class Trainer:
    """The actor, with PPO its critic, and where a KL penalty asks for it the reference: all that learns or is asked
    while learning.

    Args:
        model: the actor; trained in place.
        reference: the run's start where ``model`` has moved from it already; None: ``model`` as it is.
    """

    def __init__(self, model: Any, recipe: Recipe, *, reference: Any = None):
        self.recipe, self.config = recipe, recipe.rl
        config = self.config
        refuse_dropout(recipe)
        updates = self.updates = config.prompts // (config.minibatch_prompts or config.prompts)
        self.warmup = config.critic.warmup_steps if config.has_critic else 0
        temperature = recipe.rollout.temperature or 1.0
        forward = policy_forward(temperature, entropy_gradient=config.entropy_bonus > 0)
        self.actor = Learner(
            model, config.optim, total_steps=(config.steps - self.warmup) * updates,
            micro_batch_tokens=config.micro_batch_tokens, forward=forward,
        )  # fmt: skip
        self.critic: Learner | None = None
        if config.has_critic:
            self.critic = Learner(
                Critic(model), config.critic.optim, total_steps=config.steps * updates * config.critic.epochs,
                micro_batch_tokens=config.micro_batch_tokens, forward=token_values,
            )  # fmt: skip
        self.reference: Any = None
        if config.kl.place != "off" and not has_lora(model):
            self.reference = reference if reference is not None else copy.deepcopy(model)
            self.reference.requires_grad_(False)

    # One step

    def step(self, groups: Sequence[TrajectoryGroup], step: int, version: int) -> dict[str, float]:
        """Learn from a step's graded groups.

        Args:
            step: counted from 0; the actor rests while the critic warms up.
            version: weight updates that the actor has behind it, to tell how old a trajectory is.

        Returns:
            The step's metrics of actor and critic (``retool.metrics``), means over the mini-batches.
        """
        config = self.config
        lessons = [
            Lesson(t, number, Sample(t.ids_T, t.mask_T, t.logprobs_T))
            for number, group in enumerate(groups)
            for t in group.trajectories
            if any(t.mask_T)
        ]
        if not lessons:
            return actor_metrics([])
        metrics = _staleness(lessons, version)
        if config.correction.level != "off":
            metrics |= self._correct(lessons)
        if config.kl.place != "off":
            metrics |= self._refer(lessons)
        if self.critic is not None:
            metrics |= self._value(lessons, self.critic)
        teaching = set_advantages(lessons, config)
        if config.overlong.filter:
            teaching = _without_cut(teaching)
        batches = self._mini_batches(teaching, groups)
        # Schedules go by the step: an update that had nothing to learn from counts all the same.
        if self.critic is not None:
            self.critic.step_count = step * self.updates * config.critic.epochs
            metrics |= self._learn_values(batches, self.critic)
        if step >= self.warmup:
            self.actor.step_count = (step - self.warmup) * self.updates
            metrics |= self._learn_policy(batches)
        return metrics

    def _mini_batches(self, lessons: list[Lesson], groups: Sequence[TrajectoryGroup]) -> list[tuple[list[Sample], int]]:
        """For each mini-batch of tasks its samples, and the trajectories that its tasks had in all."""
        size = self.config.minibatch_prompts or self.config.prompts
        found = []
        for start in range(0, len(groups), size):
            samples = [x.sample for x in lessons if start <= x.group < start + size]
            if samples:
                found.append((samples, sum(len(g.trajectories) for g in groups[start : start + size])))
        return found

    def _learn_policy(self, batches: list[tuple[list[Sample], int]]) -> dict[str, float]:
        length = self.recipe.rollout.max_response_tokens
        loss = policy_loss(self.config)
        parts = [
            self.actor.update(
                samples, loss, aggregation=self.config.aggregation, sequences=trajectories, max_tokens=length
            )
            for samples, trajectories in batches
        ]
        return actor_metrics(parts)

    def _learn_values(self, batches: list[tuple[list[Sample], int]], critic: Learner) -> dict[str, float]:
        config = self.config.critic
        scale = float(critic.model.std)

        def loss(values_N: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            loss_N, clipped_N = value_loss(
                values_N / scale, batch.values_N / scale, batch.returns_N / scale, clip=config.value_clip
            )
            return loss_N, {"critic/vf_clipfrac": clipped_N, "critic/vpred_mean": values_N.detach()}

        parts = [critic.update(samples, loss) for _ in range(config.epochs) for samples, _ in batches]
        if not parts:
            return {}
        names = {"loss": "critic/vf_loss", "grad_norm": "critic/grad_norm", "lr": "critic/lr"}
        return _means(parts, names) | {
            "critic/updates": float(len(parts)),
            "critic/skipped": sum(p["skipped"] for p in parts),
        }

    # What is asked before anything is learnt

    def _correct(self, lessons: list[Lesson]) -> dict[str, float]:
        """The learner's own log-probabilities become the old ones, and weights make up for the sampler's."""
        config = self.config.correction
        fresh = self.actor.evaluate([x.sample for x in lessons], lambda outputs: outputs.logprobs_N)
        weights, gaps = [], []
        for x, logprobs in zip(lessons, fresh, strict=True):
            own_N, rollout_N = torch.tensor(logprobs), torch.tensor(_at_mask(x.sample.logprobs_T or [], x.sample))
            weights_N = importance_weights(
                own_N, rollout_N, torch.zeros(len(logprobs), dtype=torch.long),
                level=config.level, mode=config.mode, low=config.low, high=config.high,
            )  # fmt: skip
            weights.append(weights_N)
            gaps.append((own_N - rollout_N).abs())
            x.sample = replace(x.sample, logprobs_T=_spread(logprobs, x.sample.mask_T), weights_N=weights_N.tolist())
        every, gap = torch.cat(weights), torch.cat(gaps)
        return {
            "training/rollout_is_weight_mean": float(every.mean()),
            "training/rollout_is_weight_max": float(every.max()),
            "training/rollout_is_bounded_share": float(((every >= config.high) | (every == 0)).float().mean()),
            "training/rollout_logprob_gap_mean": float(gap.mean()),
            "training/rollout_logprob_gap_max": float(gap.max()),
        }

    def _refer(self, lessons: list[Lesson]) -> dict[str, float]:
        """The reference's log-probabilities; with ``kl.place = reward`` the penalty on each token."""
        config, samples = self.config.kl, [x.sample for x in lessons]
        with self._as_reference():
            found = self.actor.evaluate(samples, lambda outputs: outputs.logprobs_N)
        total = tokens = 0.0
        for x, ref in zip(lessons, found, strict=True):
            x.sample = replace(x.sample, ref_logprobs_N=ref)
            old_N = torch.tensor(_at_mask(x.sample.logprobs_T or [], x.sample))
            kl_N = kl_penalty(old_N, torch.tensor(ref), config.estimator)
            total, tokens = total + float(kl_N.sum()), tokens + len(ref)
            if config.place == "reward":
                x.penalty = config.coef * float(kl_N.sum())
        return {"actor/reference_kl": total / max(1.0, tokens)}

    def _as_reference(self) -> AbstractContextManager[None]:
        """While this is open the actor's learner asks the reference."""
        if self.reference is None:
            return without_lora(self.actor.model)
        return _Instead(self.actor, self.reference)

    def _value(self, lessons: list[Lesson], critic: Learner) -> dict[str, float]:
        """Values, returns and GAE's advantages. The outcome's reward stands at the last sampled token."""
        config, kl = self.config.critic, self.config.kl
        values = critic.evaluate([x.sample for x in lessons], lambda values_N: values_N)
        found = []
        for x, value in zip(lessons, values, strict=True):
            rewards_N = torch.zeros(len(value), dtype=torch.float64)
            if kl.place == "reward":
                old_N = torch.tensor(_at_mask(x.sample.logprobs_T or [], x.sample), dtype=torch.float64)
                ref_N = torch.tensor(x.sample.ref_logprobs_N, dtype=torch.float64)
                rewards_N -= kl.coef * kl_penalty(old_N, ref_N, kl.estimator)
            if len(value):
                rewards_N[-1] += x.trajectory.reward
            found.append(adv.gae(rewards_N, torch.tensor(value, dtype=torch.float64), config.gamma, config.lam))
        advantages_N, returns_N = (torch.cat(column) for column in zip(*found, strict=True))
        values_N = torch.tensor([v for value in values for v in value], dtype=torch.float64)
        metrics = {
            "critic/vf_explained_var": adv.explained_variance(values_N, returns_N),
            "critic/returns/mean": float(returns_N.mean()),
            "critic/values/mean": float(values_N.mean()),
        }
        if config.whiten_advantages:
            advantages_N = adv.whiten(advantages_N)
        if config.whiten_returns:
            critic.model.update_scale(returns_N.float())
        start = 0
        for x, value in zip(lessons, values, strict=True):
            here = slice(start, start + len(value))
            start += len(value)
            x.sample = replace(
                x.sample, values_N=value, returns_N=returns_N[here].tolist(), advantages_N=advantages_N[here].tolist()
            )
        return metrics

    # A run's state

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"actor": self.actor.state_dict()}
        if self.critic is not None:
            state |= {"critic": self.critic.state_dict(), "critic_model": self.critic.model.learnt_state()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        if self.critic is not None:
            self.critic.model.load_learnt_state(state["critic_model"])
            self.critic.load_state_dict(state["critic"])


def refuse_dropout(recipe: Recipe) -> None:
    """Raises ConfigError: what is sampled without dropout would be compared with what is learnt with it."""
    if recipe.model.lora.dropout:
        raise ConfigError(
            f"model.lora.dropout = {recipe.model.lora.dropout}: RL compares log-probabilities with and without it; "
            "set it to 0"
        )


class _Instead:
    """A learner that asks another model for a while."""

    def __init__(self, learner: Learner, model: Any):
        self.learner, self.model = learner, model

    def __enter__(self) -> None:
        self.own, self.learner.model = self.learner.model, self.model

    def __exit__(self, *error: object) -> None:
        self.learner.model = self.own


def set_advantages(lessons: list[Lesson], config: RLConfig) -> list[Lesson]:
    """Give each lesson its advantage and return those that teach something. Where a group's trajectories are compared,
    a group of equal scores is left out, so that its tokens are not in the loss's denominator either; its
    trajectories' ``advantage`` stays None. GAE's advantages are there already: a trajectory's is the mean of its
    tokens'."""
    learnt: list[Lesson] = []
    if config.advantage == "gae":
        learnt = [x for x in lessons if x.sample.advantages_N]
        for x in learnt:
            tokens = list(x.sample.advantages_N or [])
            x.trajectory.advantage = sum(tokens) / len(tokens)
        return learnt
    if config.advantage == "reinforce_pp":
        scores_B = torch.tensor([x.score for x in lessons], dtype=torch.float64)
        group_B, tokens_B = (torch.tensor(c) for c in ([x.group for x in lessons], [x.sample.learnt for x in lessons]))
        return _with(lessons, adv.reinforce_pp(scores_B, group_B, tokens_B)) if lessons else []
    method = GROUP_METHODS[config.advantage]
    for number in dict.fromkeys(x.group for x in lessons):
        group = [x for x in lessons if x.group == number]
        scores_G = torch.tensor([x.score for x in group], dtype=torch.float64)
        if not adv.is_zero_variance(scores_G):
            learnt += _with(group, method(scores_G))
    return learnt


def _with(lessons: list[Lesson], advantages_B: Tensor) -> list[Lesson]:
    for x, advantage in zip(lessons, advantages_B.tolist(), strict=True):
        x.trajectory.advantage = advantage
        x.sample = replace(x.sample, advantage=advantage)
    return lessons


def policy_loss(config: RLConfig) -> Loss:
    """The recipe's loss with its KL penalty and entropy bonus, and what is logged of it."""

    def surrogate(logprobs_N: Tensor, batch: MicroBatch) -> PolicyLoss:
        old_N, advantages_N, low, high = batch.old_logprobs_N, batch.advantages_N, config.clip_low, config.clip_high
        if config.loss == "gspo":
            return gspo(logprobs_N, old_N, advantages_N, batch.row_N, clip_low=low, clip_high=high)
        if config.loss == "cispo":
            return cispo(logprobs_N, old_N, advantages_N, clip_low=low, clip_high=high)
        return ppo_clip(logprobs_N, old_N, advantages_N, clip_low=low, clip_high=high, dual_clip=config.dual_clip)

    def loss(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_N = outputs.logprobs_N
        policy = surrogate(logprobs_N, batch)
        loss_N = policy.loss_N * batch.weights_N
        logged = {
            "actor/entropy": outputs.entropy_N.detach(),
            "actor/pg_clipfrac": policy.clipped_N,
            "actor/pg_clipfrac_lower": policy.dual_clipped_N,
            "actor/ppo_kl": policy.kl_N,
            "critic/advantages/mean": batch.advantages_N,
        }
        if config.correction.level == "off":  # else the old log-probabilities are not the sampler's
            gap_N = (logprobs_N.detach() - batch.old_logprobs_N).abs()
            logged |= {"training/rollout_logprob_gap_mean": gap_N, "training/rollout_logprob_gap_max": gap_N}
        if config.kl.place == "loss":
            kl_N = kl_penalty(logprobs_N, batch.ref_logprobs_N, config.kl.estimator)
            loss_N = loss_N + config.kl.coef * kl_N
            logged["actor/kl_loss"] = kl_N.detach()
        if config.entropy_bonus:
            loss_N = loss_N - config.entropy_bonus * outputs.entropy_N
        return loss_N, logged

    return loss


def actor_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """The updates of a step as one set of metrics; where every group was dropped, only that no update was made. The
    log-probability gap is that of the first update, before any weight has changed."""
    metrics = {"actor/updates": float(len(parts)), "actor/skipped": sum(p["skipped"] for p in parts)}
    if not parts:
        return metrics
    names = {"loss": "actor/pg_loss", "grad_norm": "actor/grad_norm", "lr": "actor/lr"}
    metrics |= _means(parts, names) | {n: value for n, value in parts[0].items() if n.startswith("training/")}
    return metrics | {"tokens/learnt": sum(p["tokens"] for p in parts)}


def _means(parts: list[dict[str, float]], names: dict[str, str]) -> dict[str, float]:
    """Over a step's updates, of what the learner reports under ``names`` and of what its loss asked to log."""
    return {names.get(n, n): sum(p[n] for p in parts) / len(parts) for n in parts[0] if n in names or "/" in n}


def _without_cut(lessons: list[Lesson]) -> list[Lesson]:
    """Those that did not run out of room; the others' trajectories were not learnt from."""
    for x in lessons:
        if x.trajectory.stop_reason in CUT_SHORT:
            x.trajectory.advantage = None
    return [x for x in lessons if x.trajectory.advantage is not None]


def _staleness(lessons: list[Lesson], version: int) -> dict[str, float]:
    """How many weight updates have come after the oldest token of a trajectory was sampled."""
    ages = [
        version - min((turn.output.policy_version for turn in x.trajectory.turns), default=version) for x in lessons
    ]
    return {"training/staleness_mean": sum(ages) / len(ages), "training/staleness_max": float(max(ages))}


def _at_mask(values_T: Sequence[float], sample: Sample) -> list[float]:
    """The values at learnt tokens."""
    return [value for value, m in zip(values_T, sample.mask_T, strict=True) if m]


def _spread(values_N: Sequence[float], mask_T: Sequence[int]) -> list[float]:
    """The values at their tokens, 0.0 elsewhere."""
    values = iter(values_N)
    return [next(values) if m else 0.0 for m in mask_T]


__all__ = ["Lesson", "Trainer", "actor_metrics", "policy_loss", "refuse_dropout", "set_advantages"]
