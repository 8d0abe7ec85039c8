"""Evaluation: sample k answers a problem, grade them, count."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from retool.config import Recipe
from retool.data.sources import open_source
from retool.engine.model import use_threads
from retool.engine.policy import LocalPolicy
from retool.engine.runtime import Runtime, load_runtime, open_sandbox
from retool.grading.grader import judge
from retool.metrics import evaluation_summary
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.rollout import run_groups
from retool.store.resume import RunLock, begin_run, find_checkpoint
from retool.types import Task, TrajectoryGroup

EVAL_STEP = -1
"""The step in an evaluation's seeds, so that it shares no random number with training."""


def run(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """The job: evaluate the recipe's model on its split. Returns what ``summary.json`` holds."""
    with RunLock(recipe) as lock:
        find_checkpoint(recipe, "eval", progress.line)  # refuses the folder of another job
        runtime = load_runtime(recipe)
        tasks = open_source(recipe).eval_tasks(recipe.data.test_split, recipe.data.test_size)
        folder = begin_run(recipe)
        lock.take()
        folder.write_environment(job="eval", seed=recipe.run.seed, device=str(runtime.model.device))

        async def job() -> list[TrajectoryGroup]:
            async with open_sandbox(recipe) as sandbox:
                return await sample(runtime, tasks, sandbox, progress=progress)

        groups = asyncio.run(job())
        folder.write_eval("model", groups)
        summary = summarise(groups, recipe)
        folder.write_summary({"eval": summary, "model": recipe.model.path, "seed": recipe.run.seed})
    show(summary, progress)
    return summary


async def sample(
    runtime: Runtime,
    tasks: list[Task],
    sandbox: Sandbox,
    *,
    progress: Progress | None = None,
    label: str = "evaluation",
    step: int = EVAL_STEP,
    policy: LocalPolicy | None = None,
) -> list[TrajectoryGroup]:
    """Sample and grade k trajectories for each task, with the evaluation's own temperature and top-p.

    Args:
        policy: one that is there already, so that its KV cache serves here too.
    """
    recipe = runtime.recipe
    use_threads(recipe.run, sandbox=recipe.rollout.tools)
    config = recipe.rollout.model_copy(update={"temperature": recipe.eval.temperature, "top_p": recipe.eval.top_p})
    rollout = replace(runtime.rollout(policy or runtime.policy(), sandbox), config=config)
    with (progress or Progress(quiet=True)).stage(label, total=len(tasks) * recipe.eval.k) as stage:
        groups = await run_groups(
            rollout,
            tasks,
            recipe.eval.k,
            seed=recipe.run.seed,
            step=step,
            on_trajectory=lambda _: stage.advance(),
        )
    judged = await asyncio.to_thread(judge, groups, recipe.rl)
    if progress and judged.unjudged:
        progress.line(f"{judged.unjudged} answers could not be judged in time: they count as wrong")
    return groups


def summarise(groups: list[TrajectoryGroup], recipe: Recipe) -> dict[str, Any]:
    return evaluation_summary(groups, recipe.eval.k, recipe.eval.bootstrap, recipe.run.seed)


def show(summary: dict[str, Any], progress: Progress) -> None:
    """One evaluation as a small table."""
    k, (low, high) = summary["k"], summary["ci95"]
    extra = ("pass", "maj") if k > 1 else ()
    rows: list[list[float | int | str]] = [
        [f"mean@{k}", f"{summary['accuracy']:.3f}  (95 % {low:.3f} to {high:.3f})"],
        ["samples", f"{summary['samples']} of {summary['problems']} problems, {summary['infra']} lost to infra"],
        ["num_turns", f"{summary['num_turns']:.2f}"],
        ["call rate", _share(summary["call_rate"])],
        ["executions", ", ".join(f"{n} {status}" for status, n in summary["executions"].items() if n) or "none"],
        ["malformed calls", str(summary["malformed"])],
    ]
    for place, name in enumerate(extra, start=1):
        rows.insert(place, [f"{name}@{k}", _share(summary[f"{name}@{k}"])])
    progress.table("Evaluation", ["", "value"], rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
