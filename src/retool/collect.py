"""What a step learns from: draw tasks, roll out, grade, and where the recipe asks for it replace groups that teach
nothing (DAPO's dynamic sampling) and cut the long tail off."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from retool.config import Recipe
from retool.data.sources import Source
from retool.grading.grader import judge
from retool.grading.rewards import punish_overlong
from retool.rollout import Rollout, run_groups, sample_numbers
from retool.tail import PendingGroup, run_until
from retool.types import TrajectoryGroup


@dataclass
class Batch:
    """A step's groups, graded."""

    groups: list[TrajectoryGroup]
    """To learn from: ``rl.prompts`` of them, or fewer where too few were found."""
    rolled: list[TrajectoryGroup]
    """All that were finished in this step; their tokens were paid for."""
    carried: list[TrajectoryGroup]
    """Of ``groups``, those that an earlier step had rolled out."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Collector:
    """The position in the data and what is left over from earlier steps: a part of a run's state."""

    recipe: Recipe
    rollout: Rollout
    source: Source
    tasks: int = 0
    """Tasks drawn so far."""
    draws: int = 0
    """Rounds so far: the ``step`` in the seeds of what is begun next. Without dynamic sampling, the RL step itself."""
    surplus: list[TrajectoryGroup] = field(default_factory=list)
    """Graded groups that the last batch had no room for."""
    pending: list[PendingGroup] = field(default_factory=list)
    """Groups that were begun and are not done."""

    async def collect(self) -> Batch:
        """The batch of the next step.

        Raises:
            whatever ``run_trajectory`` and ``judge`` raise.
        """
        config, dynamic = self.recipe.rl, self.recipe.rl.dynamic_sampling
        ready, rolled, carried = self.surplus, list[TrajectoryGroup](), self.surplus
        self.surplus = []
        rounds, replaced = 0, 0
        metrics: dict[str, float] = defaultdict(float)
        while len(ready) < config.prompts and rounds < (dynamic.max_rounds if dynamic.enabled else 1):
            started = time.perf_counter()
            groups = await self._roll(metrics)
            metrics["timing_s/rollout"] += time.perf_counter() - started
            await self._grade(groups, metrics)
            teaching = [group for group in groups if not dynamic.enabled or is_mixed(group)]
            replaced += len(groups) - len(teaching)
            ready, rolled, rounds = ready + teaching, rolled + groups, rounds + 1
        batch, rest = ready[: config.prompts], ready[config.prompts :]
        if dynamic.enabled:
            self.surplus = rest if dynamic.keep_surplus else []
            metrics["sampling/rounds"] = rounds
            metrics["sampling/replaced"] = replaced
            metrics["sampling/surplus"] = len(rest)
            metrics["sampling/missing"] = config.prompts - len(batch)
        return Batch(batch, rolled, carried, {name: float(value) for name, value in metrics.items()})

    async def _roll(self, metrics: dict[str, float]) -> list[TrajectoryGroup]:
        """A round of ``rl.prompts`` finished groups."""
        config, tail = self.recipe.rl, self.recipe.rl.tail
        draw, self.draws = self.draws, self.draws + 1
        wanted = math.ceil(config.prompts * tail.oversample)
        tasks = self.source.train_tasks(self.tasks, wanted - len(self.pending))
        self.tasks += len(tasks)
        if tail.oversample == 1:
            return await run_groups(self.rollout, tasks, config.group_size, seed=self.recipe.run.seed, step=draw)
        numbers = sample_numbers(tasks, config.group_size)
        begun = [PendingGroup(task, draw, own) for task, own in zip(tasks, numbers, strict=True)]
        carried = sum(t.sampled_length for group in self.pending for t in group.trajectories.values())
        groups, rest = await run_until(self.rollout, [*self.pending, *begun], config.prompts, seed=self.recipe.run.seed)
        self.pending = rest if tail.partial else []
        metrics.setdefault("tail/carried_tokens", carried)  # later rounds carry what this step has sampled itself
        metrics["tail/groups_left"] = len(rest)
        metrics["tail/tokens_left"] = sum(t.sampled_length for group in rest for t in group.trajectories.values())
        return groups

    async def _grade(self, groups: list[TrajectoryGroup], metrics: dict[str, float]) -> None:
        started = time.perf_counter()
        judged = await asyncio.to_thread(judge, groups, self.recipe.rl)
        punish_overlong(groups, self.recipe.rl.overlong, self.recipe.rollout.max_response_tokens)
        for name, value in judged.metrics().items():
            metrics[name] += value
        metrics["timing_s/grade"] += time.perf_counter() - started

    # A run's state. Groups go into a file of trajectories, in the order of ``left_over``.

    def state(self) -> dict[str, Any]:
        """Numbers only; ``left_over`` holds the rest."""
        pending = [[group.draw, group.samples.start, group.samples.stop] for group in self.pending]
        return {"tasks": self.tasks, "draws": self.draws, "surplus": len(self.surplus), "pending": pending}

    def left_over(self) -> list[TrajectoryGroup]:
        """Surplus groups, then the pending ones with what they have."""
        return [
            *self.surplus,
            *(TrajectoryGroup(group.task, list(group.trajectories.values())) for group in self.pending),
        ]

    def load(self, state: dict[str, Any], left_over: list[TrajectoryGroup]) -> None:
        """The state that ``state`` and ``left_over`` told."""
        self.tasks, self.draws = state["tasks"], state["draws"]
        self.surplus = left_over[: state["surplus"]]
        self.pending = [
            PendingGroup(group.task, draw, range(start, stop), {t.sample: t for t in group.trajectories})
            for group, (draw, start, stop) in zip(left_over[state["surplus"] :], state["pending"], strict=True)
        ]


def is_mixed(group: TrajectoryGroup) -> bool:
    """Neither all right nor all wrong."""
    return len({t.grade is not None and t.grade.correct for t in group.trajectories}) > 1
