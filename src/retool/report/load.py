"""What a run folder holds, as far as a report needs it. Whatever is missing is left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retool.store import RunFolder, read_groups
from retool.types import Trajectory

STAGES = {
    "base": "Base",
    "sft": "Cold start",
    "grpo": "GRPO",
    "text_only": "Text-only GRPO",
}
"""The stages of a quickstart in the order in which they are told."""
CURVES = {"grpo": "GRPO", "text_only": "Text-only GRPO"}
"""The sub-folders of a quickstart whose steps are reinforcement learning."""

Row = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One evaluated model."""

    key: str
    title: str
    summary: dict[str, Any] = field(default_factory=dict)
    """An ``evaluation_summary``; empty where there is none."""
    attempts: dict[str, Trajectory] = field(default_factory=dict)
    """By task id, the trajectory with the lowest sample number; empty where none were kept."""

    def number(self, name: str) -> float | None:
        """A number of the summary; None where it is missing or null."""
        return number(self.summary.get(name))

    @property
    def interval(self) -> tuple[float, float] | None:
        ends = self.summary.get("ci95")
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            return None
        low, high = number(ends[0]), number(ends[1])
        return None if low is None or high is None else (low, high)

    @property
    def families(self) -> dict[str, dict[str, Any]]:
        found = self.summary.get("families")
        return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Curve:
    """The steps of one training run."""

    key: str
    title: str
    rows: list[Row]

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it is there and finite."""
        pairs = [(row["step"], row[name]) for row in self.rows if math.isfinite(row.get(name, math.nan))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def names(self) -> set[str]:
        return {name for row in self.rows for name in row}


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    name: str
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]
    stages: list[Stage]
    curves: list[Curve]
    """Reinforcement learning; the first is the run itself, the others are set against it."""
    sft: Curve | None

    def stage(self, key: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.key == key), None)


def number(value: Any) -> float | None:
    """``value`` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _attempts(file: Path) -> dict[str, Trajectory]:
    if not file.exists():
        return {}
    firsts = (min(g.trajectories, key=lambda t: t.sample) for g in read_groups(file) if g.trajectories)
    return {trajectory.task.id: trajectory for trajectory in firsts}


def _stages(run: RunFolder, summary: dict[str, Any]) -> list[Stage]:
    labels = run.eval_labels()
    keys = [key for key in STAGES if isinstance(summary.get(key), dict) or key in labels]
    stages = []
    for key in [*keys, *(label for label in labels if label not in STAGES)]:
        numbers = summary.get(key)
        title = STAGES.get(key, key.replace("_", " "))
        attempts = _attempts(run.eval_trajectories(key)) if key in labels else {}
        stages.append(Stage(key, title, numbers if isinstance(numbers, dict) else {}, attempts))
    if len(stages) <= 1 and number(summary.get("accuracy")) is not None:
        # an evaluation by itself: its numbers stand at the top of summary.json
        one = stages[0] if stages else Stage("evaluation", "Evaluation")
        return [Stage(one.key, one.title, summary, one.attempts)]
    return stages


def _step_stages(run: RunFolder) -> list[Stage]:
    """A training run by itself has no stages: its first and last kept step take their place."""
    steps = run.trajectory_steps()
    ends = sorted({steps[0], steps[-1]}) if steps else []
    return [Stage(f"step_{n}", f"Step {n}", {}, _attempts(run.step_trajectories(n))) for n in ends]


def load(path: Path) -> Report:
    """Read a run folder: a quickstart's, a training run's or an evaluation's.

    Raises:
        UserError: there is no run at ``path``, or one of its files is broken.
    """
    run = RunFolder.open(path)
    summary = run.summary()
    curves, sft = [], None
    own = Curve("run", path.resolve().name, run.metrics())
    if own.points("train/loss")[0] and not own.points("acc/mean")[0]:
        sft = own
    elif own.rows:
        curves.append(own)
    for key, title in CURVES.items():
        if (path / key / "metrics.jsonl").exists():
            curves.append(Curve(key, title, RunFolder.open(path / key).metrics()))
    if (path / "sft" / "metrics.jsonl").exists():
        sft = Curve("sft", "Cold start", RunFolder.open(path / "sft").metrics())
    return Report(
        name=path.resolve().name,
        summary=summary,
        environment=run.environment(),
        config=run.config(),
        stages=_stages(run, summary) or _step_stages(run),
        curves=[curve for curve in curves if curve.rows],
        sft=sft,
    )
