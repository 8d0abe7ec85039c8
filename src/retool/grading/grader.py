"""Grading trajectories, and a step's groups."""

from __future__ import annotations

from collections.abc import Iterable

from retool.config import RLConfig
from retool.grading.answers import extract_answer, find_answer
from retool.grading.equivalence import equivalent
from retool.grading.rewards import Reward, find_reward
from retool.grading.verifier import SHARED, Counts, Verifier
from retool.protocols import Grader
from retool.types import Grade, Trajectory, TrajectoryGroup

LOST_S = 30.0
"""What the hostile answers of one batch may cost: about ten that do not end. Later ones count as wrong at once."""


class BoxedGrader:
    r"""Reads the last ``\boxed{…}`` of the last assistant turn, and nothing else: neither what earlier turns guessed
    nor what a tool printed is an answer.

    Args:
        lenient: where there is none, take one from an earlier turn, else what the last turn says in other words
            (``answers.find_answer``).
    """

    def __init__(self, *, lenient: bool = False, verifier: Verifier = SHARED) -> None:
        self.lenient, self.verifier = lenient, verifier

    def grade(self, trajectory: Trajectory) -> Grade:
        prediction = self._predict([turn.text for turn in trajectory.turns])
        return Grade(equivalent(prediction, trajectory.task.answer, verifier=self.verifier), prediction)

    def _predict(self, texts: list[str]) -> str | None:
        if not texts:
            return None
        strict = extract_answer(texts[-1])
        if strict is not None or not self.lenient:
            return strict
        earlier = (extract_answer(text) for text in reversed(texts[:-1]))
        return next((found for found in earlier if found is not None), None) or find_answer(texts[-1])


def judge(groups: Iterable[TrajectoryGroup], config: RLConfig, *, lost_s: float = LOST_S) -> Counts:
    """``grade_groups`` as the recipe wants it.

    Raises:
        ConfigError: see ``rewards.find_reward``.
    """
    grader = BoxedGrader(lenient=config.grading == "lenient")
    return grade_groups(groups, grader, find_reward(config.reward), lost_s=lost_s)


def grade_groups(
    groups: Iterable[TrajectoryGroup],
    grader: Grader,
    reward: Reward,
    *,
    verifier: Verifier = SHARED,
    lost_s: float = LOST_S,
) -> Counts:
    """Set ``grade`` and ``reward`` of every trajectory; those that the infrastructure lost get neither. Blocks while it
    judges: where an event loop runs, call it in a thread.

    Returns:
        What became of the answers that were no plain numbers.
    """
    before = verifier.counts.copy()
    with verifier.budget(lost_s):
        for group in groups:
            for trajectory in group.trajectories:
                trajectory.grade = grader.grade(trajectory)
                trajectory.reward = reward(trajectory)
    return verifier.counts.since(before)
