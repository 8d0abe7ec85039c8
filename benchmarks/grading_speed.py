"""How fast answers are graded: integers, mathematics behind its process against math-verify called directly, and what a
batch of hostile answers costs."""

from __future__ import annotations

import time

import math_verify

from retool.grading import equivalent
from retool.grading.grader import BoxedGrader, grade_groups
from retool.grading.rewards import paper
from retool.grading.verifier import SHARED
from retool.types import Finish, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn

INTEGERS = 20_000
HARD = 400
HOSTILE = ["100000000!", r"\binom{1000000000}{500000000}", "(a+b+c+d)^{500}", "x^{9999}(y+1)^{9999}"]
GROUP = 16


def trajectory(text: str) -> Trajectory:
    return Trajectory(Task("t", "s", [], "72"), 0, [1], [Turn(TokenOutput([1], [-1.0], Finish.STOP), text)])


def main() -> None:
    groups = [
        TrajectoryGroup(Task("t", "s", [], "72"), [trajectory(rf"It is \boxed{{{n % 99}}}.") for n in range(INTEGERS)])
    ]
    started = time.perf_counter()
    grade_groups(groups, BoxedGrader(), paper)
    print(f"integers, extraction included: {INTEGERS / (time.perf_counter() - started):,.0f} a second")

    pairs = [(rf"\frac{{{n}}}{{\sqrt{{3}}}}", rf"\frac{{{n}\sqrt{{3}}}}{{3}}") for n in range(1, HARD + 1)]
    equivalent("x", "y+1")  # the process is up
    started = time.perf_counter()
    assert all(equivalent(*pair) for pair in pairs)
    ours = HARD / (time.perf_counter() - started)
    started = time.perf_counter()
    for found, gold in pairs:
        assert math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${found}$"))
    theirs = HARD / (time.perf_counter() - started)
    print(f"mathematics: {ours:,.0f} a second, math-verify called directly {theirs:,.0f}: ratio {ours / theirs:.2f}")

    before = SHARED.counts.copy()
    hostile = [trajectory(rf"\boxed{{{answer}}}") for answer in HOSTILE for _ in range(GROUP)]
    started = time.perf_counter()
    grade_groups([TrajectoryGroup(Task("t", "s", [], "72"), hostile)], BoxedGrader(), paper)
    print(f"{len(hostile)} hostile answers: {time.perf_counter() - started:.1f} s, {SHARED.counts.since(before)}")


if __name__ == "__main__":
    main()
