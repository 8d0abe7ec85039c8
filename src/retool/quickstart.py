"""The whole job on this machine: evaluate the base model, fine-tune it on demonstrations, evaluate, train it with code
execution, evaluate, and write the report."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from retool import evaluate, rl, sft
from retool.config import Recipe
from retool.data.sources import open_source
from retool.engine.runtime import Runtime, load_runtime, open_sandbox
from retool.errors import UserError
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.report import write_report
from retool.store import RunFolder

STAGES = {"base": "base model", "sft": "after SFT", "grpo": "after GRPO", "text_only": "text-only RL"}


def run(recipe: Recipe, *, from_scratch: bool, with_control: bool, progress: Progress) -> dict[str, Any]:
    """The job. A quickstart that was run before is replaced.

    Returns:
        What ``summary.json`` holds: each stage's evaluation, ``wall_seconds`` and ``seed``.
    """
    path = Path(recipe.run.out) / recipe.run.name
    if path.exists():
        job = RunFolder.open(path).environment().get("job", "quickstart")
        if job != "quickstart":
            raise UserError(f"run.name = {recipe.run.name!r}: {path} holds a run of {job}; choose another name")
        shutil.rmtree(path)
    return asyncio.run(Quickstart(recipe, progress).run(from_scratch=from_scratch, with_control=with_control))


class Quickstart:
    """One quickstart: the stages share a sandbox, a run folder and a summary."""

    def __init__(self, recipe: Recipe, progress: Progress):
        self.recipe, self.progress = recipe, progress
        self.folder = RunFolder(Path(recipe.run.out) / recipe.run.name)
        self.tasks = open_source(recipe).eval_tasks(recipe.data.test_split, recipe.data.test_size)
        self.summary: dict[str, Any] = {"seed": recipe.run.seed}
        self.started = time.perf_counter()

    async def run(self, *, from_scratch: bool, with_control: bool) -> dict[str, Any]:
        base = self.pretrain() if from_scratch else None
        runtime = load_runtime(self.recipe, base)
        self.folder.write_config(self.recipe)
        self.folder.write_environment(job="quickstart", seed=self.recipe.run.seed, device=str(runtime.model.device))
        async with open_sandbox(self.recipe) as sandbox:
            await self.evaluate("base", runtime, sandbox)
            checkpoint = Path(sft.train(runtime, self.part("sft"), progress=self.progress)["checkpoint"])
            await self.evaluate("sft", runtime, sandbox)
            await rl.train(runtime, self.part("grpo"), sandbox, progress=self.progress, label="GRPO")
            await self.evaluate("grpo", runtime, sandbox)
            if with_control:
                await self.text_only(checkpoint, sandbox)
        self.summary["wall_seconds"] = round(time.perf_counter() - self.started, 1)
        self.folder.write_summary(self.summary)
        report = write_report(self.folder.path)
        self.show(report)
        return self.summary

    def pretrain(self) -> Path:
        from retool.nano.pretrain import STEPS, pretrain

        path = self.folder.path / "nano"
        pretrain(path, steps=STEPS, seed=self.recipe.run.seed, threads=self.recipe.run.threads, progress=self.progress)
        return path

    async def text_only(self, checkpoint: Path, sandbox: Sandbox) -> None:
        """The control: the same start, tasks and budget, and no tool in the prompt."""
        rollout = self.recipe.rollout.model_copy(update={"tools": False})
        runtime = load_runtime(self.recipe.model_copy(update={"rollout": rollout}), checkpoint)
        await rl.train(runtime, self.part("text_only"), sandbox, progress=self.progress, label="text-only RL")
        await self.evaluate("text_only", runtime, sandbox)

    def part(self, name: str) -> RunFolder:
        """The run folder of one stage."""
        return RunFolder(self.folder.path / name)

    async def evaluate(self, stage: str, runtime: Runtime, sandbox: Sandbox) -> None:
        groups = await evaluate.sample(
            runtime, self.tasks, sandbox, progress=self.progress, label=f"evaluate {STAGES[stage]}"
        )
        self.folder.write_eval(stage, groups)
        summary = evaluate.summarise(groups, runtime.recipe)
        self.summary[stage] = summary
        low, high = summary["ci95"]
        self.progress.line(
            f"  {STAGES[stage]}: accuracy {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}), "
            f"call rate {summary['call_rate']:.2f}"
        )

    def show(self, report: Path) -> None:
        rows = [
            [
                STAGES[stage],
                f"{s['accuracy']:.3f}",
                "{:.3f} – {:.3f}".format(*s["ci95"]),
                s["samples"],
                f"{s['num_turns']:.2f}",
                f"{s['call_rate']:.2f}",
            ]
            for stage, s in self.summary.items()
            if stage in STAGES
        ]
        columns = ["stage", "accuracy", "95 % interval", "samples", "num_turns", "call rate"]
        self.progress.table(f"Test split, seed {self.summary['seed']}", columns, rows)
        self.progress.line(f"{self.summary['wall_seconds']:.0f} s. Report: {report}")
