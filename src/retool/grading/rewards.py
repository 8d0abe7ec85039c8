"""Rewards: what a graded trajectory is worth. ``rl.reward`` names a preset, or a function of the user's own.

A function of one's own takes a trajectory whose ``grade`` is set, and returns a finite number::

    # my_rewards.py, beside where the command is typed:  retool rl … rl.reward=my_rewards:brief
    def brief(trajectory):
        right = trajectory.grade.correct
        return (1.0 if right else -1.0) - 0.01 * trajectory.num_calls
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from retool.config.learning import OverlongConfig
from retool.errors import ConfigError, InvariantError
from retool.types import Trajectory, TrajectoryGroup

Reward = Callable[[Trajectory], float]

RIGHT, WRONG = 1.0, -1.0
CALL_BONUS = 0.1
"""verl: what a call softens a wrong answer by, per (num_turns − 2) / 2."""
BEST_WRONG = -0.6
"""verl: no wrong answer is worth more, however many calls it made."""


def paper(trajectory: Trajectory) -> float:
    """+1 for a right final answer, −1 otherwise (ReTool, arXiv 2504.11536, equation 2)."""
    return RIGHT if _is_right(trajectory) else WRONG


def verl(trajectory: Trajectory) -> float:
    """+1 for a right final answer, otherwise min(−0.6, −1 + 0.1 · (num_turns − 2) / 2), so that a try with the tool is
    better than none (verl's ReTool recipe, ``compute_score``)."""
    return RIGHT if _is_right(trajectory) else softened(trajectory.num_turns)


def softened(num_turns: int) -> float:
    """What ``verl`` gives for a wrong answer."""
    return min(BEST_WRONG, WRONG + CALL_BONUS * (num_turns - 2) / 2)


def overlong_punishment(length: int, limit: int, buffer: int, penalty: float) -> float:
    """Soft overlong punishment, DAPO (arXiv 2503.14476, eq. 13), times ``penalty``: 0 up to ``limit − buffer`` tokens,
    then falling in a line to −1 at ``limit``.

    Args:
        length: tokens of the response, sampled and observed.
        buffer: 0 punishes nobody.
    """
    over = length - (limit - buffer)
    return -penalty * min(1.0, over / buffer) if buffer > 0 and over > 0 else 0.0


def punish_overlong(groups: Iterable[TrajectoryGroup], config: OverlongConfig, limit: int) -> None:
    """Add ``overlong_punishment`` to the reward of every trajectory that was not lost."""
    buffer = round(config.buffer_share * limit)
    for group in groups:
        for t in group.trajectories:
            t.reward += overlong_punishment(t.response_length, limit, buffer, config.penalty)


REWARDS: dict[str, Reward] = {"paper": paper, "verl": verl}


def _is_right(trajectory: Trajectory) -> bool:
    if trajectory.grade is None:
        raise InvariantError(f"task {trajectory.task.id}: a reward is asked for before the trajectory is graded")
    return trajectory.grade.correct


def find_reward(name: str) -> Reward:
    """The preset of that name, or the function that ``package.module:function`` names; modules beside which the command
    is typed are found too.

    Raises:
        ConfigError: it is neither, or cannot be imported; and, when the function is called, where what it returns is no
            finite number.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        known = ", ".join(sorted(REWARDS))
        raise ConfigError(f"rl.reward = {name!r}: give one of {known}, or package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"rl.reward = {name!r}: cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(function):
        raise ConfigError(f"rl.reward = {name!r}: {function_name} is no function; name one that takes a trajectory")

    def checked(trajectory: Trajectory) -> float:
        value = function(trajectory)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"rl.reward = {name!r}: for task {trajectory.task.id} it returned {value!r}; return a finite number"
            )
        return float(value)

    return checked
