from __future__ import annotations

import typing

import pytest

from retool.config import RLConfig
from retool.grading.grader import BoxedGrader, grade_groups
from retool.grading.rewards import REWARDS, paper
from retool.types import Finish, Grade, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn

TASK = Task("t", "s", [], "72")


def trajectory(*texts: str, observation: str = "") -> Trajectory:
    turns = [Turn(TokenOutput([1], [-1.0], Finish.STOP), text, observation_text=observation) for text in texts]
    return Trajectory(TASK, 0, [1], turns)


@pytest.mark.parametrize(
    ("texts", "grade"),
    [
        ((r"So \boxed{72}.",), Grade(True, "72")),
        ((r"\boxed{72} or \boxed{73}",), Grade(False, "73")),
        ((r"\boxed{72}", "Done."), Grade(False, None)),
        ((r"\boxed{71}", r"\boxed{72}"), Grade(True, "72")),
        (("72",), Grade(False, None)),
        ((r"\boxed{}",), Grade(False, None)),
        ((), Grade(False, None)),
    ],
)
def test_the_last_box_of_the_last_turn_counts(texts: tuple[str, ...], grade: Grade) -> None:
    assert BoxedGrader().grade(trajectory(*texts)) == grade


def test_what_a_tool_printed_is_no_answer() -> None:
    assert BoxedGrader().grade(trajectory("I print it.", observation=r"\boxed{72}")) == Grade(False, None)


def test_grading_a_step() -> None:
    lost = trajectory(r"\boxed{72}")
    groups = [
        TrajectoryGroup(TASK, [trajectory(r"\boxed{72}"), trajectory("?")], [lost]),
        TrajectoryGroup(TASK, [trajectory(r"\boxed{5}")]),
    ]
    grade_groups(groups, BoxedGrader(), paper)
    assert [[t.reward for t in g.trajectories] for g in groups] == [[1.0, -1.0], [-1.0]]
    assert [t.grade for t in groups[0].trajectories] == [Grade(True, "72"), Grade(False, None)]
    assert lost.grade is None


def test_every_reward_that_a_recipe_may_name_exists() -> None:
    assert set(REWARDS) == set(typing.get_args(RLConfig.model_fields["reward"].annotation))
