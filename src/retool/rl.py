"""Reinforcement learning on the final answer's correctness. ``train`` is the whole algorithm, top-down:
sample tasks → roll out groups → grade → advantages → update → log → check → keep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retool.collect import Collector
from retool.config import Recipe
from retool.data.sources import Source, open_source
from retool.engine.checkpoint import load_state, save_checkpoint
from retool.engine.model import load_model, prepare_torch, release_memory, use_threads
from retool.engine.policy import LocalPolicy
from retool.engine.runtime import Runtime, load_runtime, open_sandbox
from retool.errors import HealthError, InfraError
from retool.evaluate import sample as sample_evaluation
from retool.grading.rewards import find_reward
from retool.health import Monitor
from retool.metrics import figures, rollout_metrics, validation_metrics
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.store import RunFolder
from retool.store.best import Best
from retool.store.resume import RunLock, begin_run, find_checkpoint, finished, step_of
from retool.trackers import check_trackers, open_trackers
from retool.types import TrajectoryGroup
from retool.update import Trainer, refuse_dropout


def run(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """The job: load, train, leave checkpoints. Returns what ``summary.json`` holds.

    Raises:
        HealthError: an alarm of ``health.stop_on``, or steps in a row without a finite gradient.
        InfraError: the disk or the sandbox failed; what was kept is whole.
    """
    find_reward(recipe.rl.reward)  # a name that leads nowhere must not cost a model's loading
    check_trackers(recipe)
    refuse_dropout(recipe)
    with RunLock(recipe) as lock:
        checkpoint = find_checkpoint(recipe, "rl", progress.line)
        runtime = load_runtime(recipe, checkpoint)
        moved = checkpoint is not None and recipe.rl.kl.place != "off" and not recipe.model.lora.rank
        reference = None
        if moved:
            prepare_torch(recipe.run)  # random weights, where the recipe asks for such, are drawn again
            reference, _ = load_model(recipe.model)
        folder = begin_run(recipe, step_of(checkpoint))
        lock.take()

        async def job() -> dict[str, Any]:
            async with open_sandbox(recipe) as sandbox:
                return await train(
                    runtime, folder, sandbox, progress=progress, done=step_of(checkpoint), reference=reference
                )

        return asyncio.run(job())


async def train(
    runtime: Runtime,
    folder: RunFolder,
    sandbox: Sandbox,
    *,
    progress: Progress,
    done: int = 0,
    label: str = "RL",
    reference: Any = None,
) -> dict[str, Any]:
    """Train ``runtime.model`` in place.

    Args:
        done: steps that the model has behind it; the job's state of that step is in the folder.
        reference: the model that the run began with, for a KL penalty; None: ``runtime.model`` as it is.
    """
    recipe, config = runtime.recipe, runtime.recipe.rl
    folder.write_environment(job="rl", seed=recipe.run.seed, device=str(runtime.model.device))
    policy = runtime.policy()
    source = open_source(recipe)
    collector = Collector(recipe, runtime.rollout(policy, sandbox), source)
    trainer = Trainer(runtime.model, recipe, reference=reference)
    monitor = Monitor(recipe.health, compares_groups=config.compares_groups)
    best = Best("val-core/")
    if done:
        state, left_over = load_state(folder.checkpoint_path(done))
        trainer.load_state_dict(state["trainer"])
        collector.load(state["collector"], left_over)
        policy.policy_version = state["policy_version"]
        monitor.replay(folder.metrics())
        best.resume(state["best"], folder)
    if done >= config.steps:
        progress.line(f"{label}: all {config.steps} steps are done already, in {folder.path}")
        return finished(folder, done)
    tracker = open_trackers(folder, recipe, progress.line, job="rl", done=done)
    summary: dict[str, Any] = {"steps": config.steps}

    with progress.stage(label, total=config.steps) as stage:
        stage.advance(done)
        for step in range(done, config.steps):
            clock = Clock()
            with clock.time("collect"):
                use_threads(recipe.run, sandbox=True)
                batch = await collector.collect()
            with clock.time("train"):
                release_memory()
                use_threads(recipe.run, sandbox=False)
                metrics = trainer.step(batch.groups, step, policy.policy_version)
                policy.weights_updated()
                release_memory()
            metrics |= rollout_metrics(batch.rolled) | batch.metrics
            if config.eval_every and (step + 1) % config.eval_every == 0:
                with clock.time("eval"):
                    metrics |= await validate(runtime, policy, source, sandbox, step)
            with clock.time("save"):
                write_step(folder, step + 1, [*batch.rolled, *batch.carried])
            metrics |= clock.seconds() | throughput(batch.rolled, metrics, clock)
            alarms = monitor.check(step + 1, metrics)
            metrics |= {f"health/{alarm.name}": 1.0 for alarm in alarms}
            tracker.log(step + 1, metrics)
            for alarm in alarms:
                progress.line(f"! {alarm.line}")
            # A checkpoint stands for a step whose trajectories and metrics are on the disk already.
            last, fatal = step + 1 == config.steps, monitor.fatal(alarms)
            better = best.update(step + 1, metrics)
            if last or better or (config.save_every and (step + 1) % config.save_every == 0):
                state = {
                    "trainer": trainer.state_dict(),
                    "collector": collector.state(),
                    "policy_version": policy.policy_version,
                }
                summary["checkpoint"] = str(save_checkpoint(
                    folder, step + 1, recipe, runtime.model, runtime.tokenizer, state,
                    best=best, left_over=collector.left_over(), last=last,
                ))  # fmt: skip
            stage.advance(**figures(metrics))
            if fatal is not None:
                tracker.close()
                raise HealthError(f"{fatal.line}. The run ends here; {_kept(folder)}")
    tracker.close()
    folder.write_summary(summary)
    return summary


def _kept(folder: RunFolder) -> str:
    checkpoint = folder.latest_checkpoint()
    return f"its last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def write_step(folder: RunFolder, step: int, groups: list[TrajectoryGroup]) -> Path:
    """The step's trajectories into the run folder.

    Raises:
        InfraError: they cannot be written.
    """
    try:
        return folder.write_step(step, groups)
    except OSError as error:
        raise InfraError(
            f"trajectories of step {step} could not be written to {folder.path} ({error.strerror or error}); "
            f"{_kept(folder)}: mend this and type the same command again"
        ) from error


async def validate(
    runtime: Runtime, policy: LocalPolicy, source: Source, sandbox: Sandbox, step: int
) -> dict[str, float]:
    """The in-loop evaluation, on ``rl.eval_split``."""
    config = runtime.recipe.rl
    groups = await sample_evaluation(
        runtime, source.eval_tasks(config.eval_split, config.eval_size), sandbox, policy=policy
    )
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
        "perf/rollout_tokens_per_s": metrics.get("tokens/sampled", 0.0) / max(1e-9, metrics["timing_s/rollout"]),
        "perf/throughput": total / max(1e-9, sum(clock.parts.values())),
    }
