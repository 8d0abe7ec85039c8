from __future__ import annotations

import time
from pathlib import Path

import pytest

from retool.grading.grader import BoxedGrader, grade_groups
from retool.grading.rewards import paper
from retool.grading.verifier import Verifier
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


@pytest.mark.parametrize(
    ("texts", "grade"),
    [
        ((r"So \boxed{72}.",), Grade(True, "72")),
        ((r"\boxed{72}", "Done."), Grade(True, "72")),
        ((r"\boxed{71}", r"\boxed{72}", "The answer is 5."), Grade(True, "72")),
        (("Hence.\n<answer>72</answer>",), Grade(True, "72")),
        (("The answer is 72.",), Grade(True, "72")),
        (("12 + 60 = 72",), Grade(True, "72")),
        (("It is 72 or 73.",), Grade(False, "73")),
        (("None.",), Grade(False, None)),
        ((), Grade(False, None)),
    ],
)
def test_a_lenient_grader_takes_an_answer_where_it_finds_one(texts: tuple[str, ...], grade: Grade) -> None:
    assert BoxedGrader(lenient=True).grade(trajectory(*texts)) == grade


def test_hostile_answers_do_not_stall_a_step(tmp_path: Path) -> None:
    """A stand-in for math-verify that hangs on everything: the first answers cost their time, the others nothing."""
    worker = tmp_path / "worker.py"
    worker.write_text("import time\nprint('ready', flush=True)\ntime.sleep(1000)\n")
    verifier = Verifier(limit_s=0.05, worker=worker)
    answers = [trajectory(rf"\boxed{{x^{{{n}}}+1}}") for n in range(60) for _ in range(4)]
    answers += [trajectory(r"\boxed{72}")]
    started = time.monotonic()
    counts = grade_groups(
        [TrajectoryGroup(TASK, answers)], BoxedGrader(verifier=verifier), paper, verifier=verifier, lost_s=0.3
    )
    assert time.monotonic() - started < 20
    assert counts.hard == 60 + 3 * counts.over_budget / 4
    assert counts.timeouts >= 1 and counts.over_budget >= 40 and counts.crashes == 0
    assert counts.metrics()["grading/timeouts"] == counts.timeouts
    assert [t.reward for t in answers] == [-1.0] * 240 + [1.0]
    verifier.close()
