"""The strict grader, and grading a step's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from retool.grading.answers import extract_answer
from retool.grading.equivalence import equivalent
from retool.protocols import Grader
from retool.types import Grade, Trajectory, TrajectoryGroup


class BoxedGrader:
    r"""Reads the last ``\boxed{…}`` of the last assistant turn, and nothing else: neither what earlier turns guessed
    nor what a tool printed is an answer."""

    def grade(self, trajectory: Trajectory) -> Grade:
        prediction = extract_answer(trajectory.turns[-1].text) if trajectory.turns else None
        return Grade(equivalent(prediction, trajectory.task.answer), prediction)


def grade_groups(groups: Iterable[TrajectoryGroup], grader: Grader, reward: Callable[[Grade], float]) -> None:
    """Set ``grade`` and ``reward`` of every trajectory; those that the infrastructure lost get neither."""
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.grade = grader.grade(trajectory)
            trajectory.reward = reward(trajectory.grade)
