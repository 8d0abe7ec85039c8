"""verl's reward function over our grading, for verl's own agent loops on our data. Our loop grades by itself."""

from __future__ import annotations

from typing import Any

from retool.config import RLConfig
from retool.grading.grader import judge
from retool.grading.rewards import RIGHT, softened
from retool.types import Finish, StopReason, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **more: Any
) -> dict[str, float]:
    """verl's ``reward.custom_reward_function``: +1 for a right last ``\\boxed{}``, else what the reference gives for
    a wrong answer after ``extra_info["num_turns"]`` turns.

    Returns:
        ``score``, and ``acc`` (1.0 or 0.0), by which verl names ``val-core/<source>/acc/mean@n``.
    """
    answer = Turn(TokenOutput([], [], Finish.STOP), solution_str)
    task = Task("", data_source, [], str(ground_truth))
    trajectory = Trajectory(task, 0, [], [answer], StopReason.ANSWERED)
    judge([TrajectoryGroup(task, [trajectory])], RLConfig())
    right = trajectory.grade is not None and trajectory.grade.correct
    turns = max(2, int((extra_info or {}).get("num_turns") or 2))
    return {"score": RIGHT if right else softened(turns), "acc": float(right)}
