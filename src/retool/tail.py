"""The long tail of rollouts: begin more groups than are needed, stop when enough are done, keep what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from retool.rollout import Rollout, make_group, run_all, run_trajectory
from retool.types import Task, Trajectory, TrajectoryGroup


@dataclass
class PendingGroup:
    """A group of which not all trajectories are done."""

    task: Task
    draw: int
    """The draw of tasks in which it was begun: the ``step`` in its random numbers' seeds and its sessions' names."""
    samples: range
    """The numbers of its trajectories."""
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    """By number, those that were begun: done, or paused (``stop_reason`` None)."""

    @property
    def is_done(self) -> bool:
        return all(s in self.trajectories and self.trajectories[s].stop_reason is not None for s in self.samples)

    def group(self) -> TrajectoryGroup:
        return make_group(self.task, [self.trajectories[s] for s in self.samples if s in self.trajectories])


async def run_until(
    rollout: Rollout, groups: Sequence[PendingGroup], enough: int, *, seed: int
) -> tuple[list[TrajectoryGroup], list[PendingGroup]]:
    """Run all groups at once until ``enough`` of them are done.

    Returns:
        ``enough`` groups (fewer where there are fewer), in the order in which they were given, and the rest: paused, or
        done and not needed.

    Raises:
        whatever ``run_trajectory`` raises.
    """
    pause = asyncio.Event()

    def stop_if_enough() -> None:
        if not pause.is_set() and sum(group.is_done for group in groups) >= enough:
            pause.set()
            rollout.policy.interrupt()

    async def run(group: PendingGroup, sample: int) -> None:
        group.trajectories[sample] = await run_trajectory(
            rollout, group.task, sample, seed=seed, step=group.draw, start=group.trajectories.get(sample), pause=pause
        )
        stop_if_enough()

    open_samples = [
        (group, sample)
        for group in groups
        for sample in group.samples
        if sample not in group.trajectories or group.trajectories[sample].stop_reason is None
    ]
    stop_if_enough()
    await run_all(run(group, sample) for group, sample in open_samples)
    done = [group for group in groups if group.is_done][:enough]
    rest = [group for group in groups if not any(group is member for member in done)]
    return [group.group() for group in done], rest
