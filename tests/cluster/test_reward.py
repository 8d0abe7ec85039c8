"""The reward for verl's own agent loops: the reference's values, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from retool.cluster.reward import compute_score

RIGHT, WRONG = r"So it is \boxed{72}.", r"So it is \boxed{71}."


def score(solution: str, turns: Any = 2, truth: str = "72") -> tuple[float, float]:
    found = compute_score("gsm8k", solution, truth, {"num_turns": turns, "index": 4}, reward_router_address=None)
    assert set(found) == {"score", "acc"}
    return found["score"], found["acc"]


@pytest.mark.parametrize("turns", [0, 2, 3, 8, 30])
def test_a_right_answer_is_worth_one_however_many_turns_it_took(turns: int) -> None:
    assert score(RIGHT, turns) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("turns", "worth"),
    # min(-0.6, -1 + 0.1 * (num_turns - 2) / 2)
    [(2, -1.0), (4, -0.9), (6, -0.8), (8, -0.7), (10, -0.6), (12, -0.6), (40, -0.6)],
)
def test_a_wrong_answer_is_softened_by_its_calls(turns: int, worth: float) -> None:
    found, acc = score(WRONG, turns)
    assert found == pytest.approx(worth, abs=1e-12)
    assert acc == 0.0


@pytest.mark.parametrize(("turns", "worth"), [(3, -0.95), (5, -0.85), (9, -0.65)])
def test_an_odd_number_of_turns(turns: int, worth: float) -> None:
    assert score(WRONG, turns)[0] == pytest.approx(worth, abs=1e-12)


def test_without_turns_nothing_is_softened() -> None:
    for extra in (None, {}, {"num_turns": None}):
        assert compute_score("gsm8k", WRONG, "72", extra) == {"score": -1.0, "acc": 0.0}


@pytest.mark.parametrize(
    ("solution", "truth", "right"),
    [
        (r"\boxed{71} no, \boxed{72}", "72", True),
        (r"\boxed{72} no, \boxed{71}", "72", False),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        ("It is 72.", "72", False),
        ("", "72", False),
        (r"\boxed{}", "72", False),
        (r"\boxed{72", "72", False),
    ],
)
def test_the_last_box_is_the_answer(solution: str, truth: str, right: bool) -> None:
    assert score(solution, 2, truth) == ((1.0, 1.0) if right else (-1.0, 0.0))


def test_a_truth_that_is_a_number() -> None:
    """A Parquet file of one's own may hold it as one."""
    assert compute_score("mine", RIGHT, 72) == {"score": 1.0, "acc": 1.0}  # type: ignore[arg-type]
