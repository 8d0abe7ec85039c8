"""Reinforcement learning on the final answer's correctness (GRPO). ``train`` is the whole algorithm, top-down:
sample tasks → roll out groups → grade → advantages → update → log."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retool.algo.advantages import grpo, is_zero_variance
from retool.algo.batch import MicroBatch, Sample
from retool.algo.losses import ppo_clip
from retool.config import Recipe, RLConfig
from retool.data.sources import Source, open_source
from retool.engine.learner import Learner
from retool.engine.model import release_memory, use_threads
from retool.engine.runtime import (
    Runtime,
    begin_run,
    find_checkpoint,
    load_runtime,
    load_trainer_state,
    open_sandbox,
    step_of,
)
from retool.errors import ConfigError
from retool.evaluate import sample as sample_evaluation
from retool.grading.grader import judge
from retool.grading.rewards import find_reward
from retool.metrics import rollout_metrics, validation_metrics
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.rollout import run_groups
from retool.store import RunFolder
from retool.types import TrajectoryGroup


def run(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """The job: load, train, leave checkpoints. Returns what ``summary.json`` holds."""
    if recipe.rl.algorithm != "grpo":
        raise ConfigError(
            f"rl.algorithm = {recipe.rl.algorithm!r}: the local engine has no critic yet; use 'grpo', or --dry-run"
        )
    find_reward(recipe.rl.reward)  # a name that leads nowhere must not cost a model's loading
    checkpoint = find_checkpoint(recipe, "rl")
    runtime = load_runtime(recipe, checkpoint)
    folder = begin_run(recipe, checkpoint)

    async def job() -> dict[str, Any]:
        async with open_sandbox(recipe) as sandbox:
            return await train(runtime, folder, sandbox, progress=progress, done=step_of(checkpoint))

    return asyncio.run(job())


async def train(
    runtime: Runtime, folder: RunFolder, sandbox: Sandbox, *, progress: Progress, done: int = 0, label: str = "RL"
) -> dict[str, Any]:
    """Train ``runtime.model`` in place.

    Args:
        done: steps that the model has behind it; the trainer's state of that step is in the folder.
    """
    recipe, config, seed = runtime.recipe, runtime.recipe.rl, runtime.recipe.run.seed
    folder.write_environment(job="rl", seed=seed, device=str(runtime.model.device))
    source = open_source(recipe)
    policy = runtime.policy()
    rollout = runtime.rollout(policy, sandbox)
    learner = Learner(
        runtime.model, config.optim, total_steps=config.steps * updates_per_step(config),
        micro_batch_tokens=config.micro_batch_tokens,
    )  # fmt: skip
    if done:
        learner.load_state_dict(load_trainer_state(folder.checkpoint_path(done)))
    if done >= config.steps:
        progress.line(f"{label}: all {config.steps} steps are done already, in {folder.path}")
        return folder.summary()
    tracker = folder.tracker()
    summary: dict[str, Any] = {"steps": config.steps}

    with progress.stage(label, total=config.steps) as stage:
        stage.advance(done)
        for step in range(done, config.steps):
            clock = Clock()
            with clock.time("rollout"):
                use_threads(recipe.run, sandbox=True)
                tasks = source.train_tasks(step, config.prompts)
                groups = await run_groups(rollout, tasks, config.group_size, seed=seed, step=step)
            with clock.time("grade"):
                judged = await asyncio.to_thread(judge, groups, config)
                set_advantages(groups)
            with clock.time("train"):
                release_memory()
                use_threads(recipe.run, sandbox=False)
                metrics = update(learner, groups, config, recipe.rollout.temperature or 1.0)
                policy.weights_updated()
                release_memory()
            metrics |= rollout_metrics(groups) | judged.metrics()
            if config.eval_every and (step + 1) % config.eval_every == 0:
                with clock.time("eval"):
                    metrics |= await validate(runtime, source, sandbox, config.eval_size, step)
            with clock.time("save"):
                folder.write_step(step + 1, groups)
            metrics |= clock.seconds() | throughput(groups, metrics, clock)
            tracker.log(step + 1, metrics)
            # Last: a checkpoint stands for a step whose trajectories and metrics are on the disk already.
            if step + 1 == config.steps or (config.save_every and (step + 1) % config.save_every == 0):
                summary["checkpoint"] = str(runtime.save_checkpoint(folder, step + 1, learner))
            stage.advance(**figures(metrics))
    tracker.close()
    folder.write_summary(summary)
    return summary


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """What the terminal shows of a step; what there is no number for is left out."""
    shown = {
        "accuracy": "acc/mean",
        "calls": "tool/call_rate",
        "turns": "num_turns/mean",
        "entropy": "actor/entropy",
        "gap": "training/rollout_logprob_gap_max",
        "infra": "infra/trajectories",
    }
    found = {label: metrics.get(name, float("nan")) for label, name in shown.items()}
    return {label: value for label, value in found.items() if math.isfinite(value)}


def updates_per_step(config: RLConfig) -> int:
    return config.prompts // (config.minibatch_prompts or config.prompts)


def set_advantages(groups: list[TrajectoryGroup]) -> None:
    """Each trajectory's advantage from its group's rewards. In a group of equal rewards it stays None: such a group
    teaches nothing and is dropped, so that its tokens are not in the loss's denominator either."""
    for group in groups:
        rewards_G = torch.tensor([t.reward for t in group.trajectories])
        if len(rewards_G) and not is_zero_variance(rewards_G):
            for trajectory, advantage in zip(group.trajectories, grpo(rewards_G).tolist(), strict=True):
                trajectory.advantage = advantage


def to_samples(groups: list[TrajectoryGroup]) -> list[Sample]:
    """The trajectories that have an advantage, as the learner takes them."""
    return [
        Sample(t.ids_T, t.mask_T, t.logprobs_T, t.advantage)
        for group in groups
        for t in group.trajectories
        if t.advantage is not None
    ]


def update(learner: Learner, groups: list[TrajectoryGroup], config: RLConfig, temperature: float) -> dict[str, float]:
    """One optimiser step for each mini-batch of tasks. Returns the actor's metrics, means over the mini-batches; the
    log-probability gap is that of the first one, before any weight has changed."""

    def loss(logprobs_N: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy_loss = ppo_clip(
            logprobs_N, batch.old_logprobs_N, batch.advantages_N,
            clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
        )  # fmt: skip
        gap_N = (logprobs_N.detach() - batch.old_logprobs_N).abs()
        return policy_loss.loss_N, {
            "actor/pg_clipfrac": policy_loss.clipped_N,
            "actor/pg_clipfrac_lower": policy_loss.dual_clipped_N,
            "actor/ppo_kl": policy_loss.kl_N,
            "training/rollout_logprob_gap_mean": gap_N,
            "training/rollout_logprob_gap_max": gap_N,
            "critic/advantages/mean": batch.advantages_N,
        }

    size = config.minibatch_prompts or config.prompts
    parts = []
    for start in range(0, len(groups), size):
        samples = to_samples(groups[start : start + size])
        if samples:
            parts.append(learner.update(samples, loss, temperature=temperature))
    return actor_metrics(parts)


def actor_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """The updates of a step as one set of metrics; where every group was dropped, only that no update was made."""
    metrics = {"actor/updates": float(len(parts)), "actor/skipped": sum(p["skipped"] for p in parts)}
    if not parts:
        return metrics
    names = {"loss": "actor/pg_loss", "entropy": "actor/entropy", "grad_norm": "actor/grad_norm", "lr": "actor/lr"}
    for name in parts[0]:
        if name.startswith("training/"):
            metrics[name] = parts[0][name]
        elif name in names or "/" in name:
            metrics[names.get(name, name)] = sum(p[name] for p in parts) / len(parts)
    metrics["tokens/learnt"] = sum(p["tokens"] for p in parts)
    return metrics


async def validate(runtime: Runtime, source: Source, sandbox: Sandbox, size: int, step: int) -> dict[str, float]:
    """The in-loop evaluation, on ``rl.eval_split``."""
    groups = await sample_evaluation(runtime, source.eval_tasks(runtime.recipe.rl.eval_split, size), sandbox)
    return validation_metrics(groups, runtime.recipe.eval.k, runtime.recipe.eval.bootstrap, step)


class Clock:
    """Wall seconds of a step's parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        return {f"timing_s/{part}": s for part, s in self.parts.items()} | {"timing_s/step": sum(self.parts.values())}


def throughput(groups: list[TrajectoryGroup], metrics: dict[str, float], clock: Clock) -> dict[str, float]:
    """Tokens a second, sampled ones over the rollout and all of them over the step."""
    total = sum(len(t.prompt_ids) + t.response_length for g in groups for t in g.trajectories)
    return {
        "perf/rollout_tokens_per_s": metrics.get("tokens/sampled", 0.0) / max(1e-9, clock.parts["rollout"]),
        "perf/throughput": total / max(1e-9, sum(clock.parts.values())),
    }
