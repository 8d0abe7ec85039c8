"""verl's reward function over our grading, for verl's own agent loops on our data. Our loop grades by itself."""

from __future__ import annotations

from typing import Any

from retool.config import RLConfig
from retool.grading.grader import judge
from retool.types import Finish, StopReason, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **more: Any
) -> dict[str, float]:
    """verl's ``reward.custom_reward_function``: +1 for a right last ``\\\\boxed{}``, else the reference's reward by
    ``extra_info["num_turns"]``.

    Returns:
        ``score``, and ``acc`` (1.0 or 0.0), by which verl names ``val-core/<source>/acc/mean@n``.
    """
    turns = max(2, int((extra_info or {}).get("num_turns") or 2))
    answer = Turn(TokenOutput([], [], Finish.STOP), solution_str)
    # verl's num_turns counts messages: a question, then answers and tool messages in turn
    calls = [Turn(TokenOutput([], [], Finish.STOP), observation_ids=[0]) for _ in range((turns - 2) // 2)]
    task = Task("", data_source, [], str(ground_truth))
    trajectory = Trajectory(task, 0, [], [*calls, answer], StopReason.ANSWERED)
    judge([TrajectoryGroup(task, [trajectory])], RLConfig(reward="verl"))
    return {"score": trajectory.reward, "acc": float(trajectory.grade is not None and trajectory.grade.correct)}
