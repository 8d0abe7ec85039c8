"""Reward presets, under the names that ``RLConfig.reward`` takes."""

from __future__ import annotations

from collections.abc import Callable

from retool.types import Grade

RIGHT, WRONG = 1.0, -1.0


def paper(grade: Grade) -> float:
    """+1 for a right final answer, −1 otherwise (ReTool, arXiv 2504.11536, equation 2)."""
    return RIGHT if grade.correct else WRONG


REWARDS: dict[str, Callable[[Grade], float]] = {"paper": paper}
