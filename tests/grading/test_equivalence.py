from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.grading.answers import extract_answer
from retool.grading.equivalence import equivalent


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        ("72", "72"),
        (" 72\n", "72"),
        ("072", "72"),
        ("+72", "72"),
        ("72.0", "72"),
        ("72.", "72"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("$72$", "72"),
        (r"\$72", "72"),
        ("−72", "-72"),
        ("-0", "0"),
        (".5", r"\frac{1}{2}"),
        ("3/6", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\frac{1}{3}", "-1/3"),
        (r"336^\circ", "336"),
        ("336", r"336^\circ"),
        (r"336^{\circ}", "336"),
        (r"50\%", "50"),
        (r"72\text{ apples}", "72"),
        ("x = 72", "72"),
        (r"2^{10}", "1024"),
        ("10!", "3628800"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"\text{Even}", "even"),
        (r"\text{A}", "A"),
        (r"\frac{0}{0}", r"\frac{0}{0}"),
    ],
)
def test_equal(prediction: str, truth: str) -> None:
    assert equivalent(prediction, truth)


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        (None, "72"),
        ("", "72"),
        ("", ""),
        ("$", ""),
        (" ", " "),
        ("72", ""),
        ("73", "72"),
        ("-72", "72"),
        ("72.0000001", "72"),
        ("1.0000000000000000000001", "1"),
        ("100000000000000000001", "100000000000000000000"),
        ("0.333333", r"\frac{1}{3}"),
        ("3.1415926", r"\pi"),
        ("72 or 73", "72"),
        ("72, 73", "72"),
        ("71 < 72", "72"),
        ("72 = 73", "72"),
        (r"72 \approx 73", "72"),
        ("1 2", "12"),
        ("1 2", "3"),
        ("1,23", "123"),
        ("12,34", "1234"),
        ("l2", "12"),
        ("O", "0"),
        ("７２", "72"),
        ("not 72", "72"),
        ("172", "72"),
        ("720", "72"),
        ("1/0", "0"),
        (r"\text{listen}", r"\text{silent}"),
        ("listen", "silent"),
        ("B", "A"),
        (r"\text{B}", "A"),
        ("(1, 2)", "(2, 1)"),
        ("[1, 2]", "(1, 2)"),
        ("x^2", "x^3"),
    ],
)
def test_not_equal(prediction: str | None, truth: str) -> None:
    assert not equivalent(prediction, truth)


# Seconds to hours, if math-verify were to see them.
PATHOLOGICAL = [
    "9^{9^{9^{9}}}",
    "9**9**9",
    "9^{(9^{9})}",
    "10^{1000000000}",
    "((9!)!)!",
    "9!!!",
    "100000000!",
    r"\binom{1000000000}{500000000}",
    r"\sum_{n=1}^{1000000} \frac{1}{n^3}",
    r"\int_0^1 x^x dx",
    "x^{9999}(y+1)^{9999}",
    "(a+b+c+d)^{500}",
    "(" * 500 + "1" + ")" * 500,
    r"\sqrt{" * 30 + "1" + "}" * 30,
    "{" * 40,
    "1+" * 10_000 + "1",
    "9" * 10_000,
    "0." + "9" * 100_000,
    "1/" * 200 + "1",
]


@pytest.mark.parametrize("prediction", PATHOLOGICAL, ids=range(len(PATHOLOGICAL)))
def test_what_could_take_for_ever_is_refused(prediction: str) -> None:
    """A hang would show as a test that does not end."""
    assert not equivalent(prediction, "1729")


@settings(max_examples=200, deadline=None)
@given(st.integers())
def test_integers_are_compared_exactly(value: int) -> None:
    assert equivalent(f"{value:,}", str(value))
    assert equivalent(f"{value}.000", str(value))
    assert not equivalent(str(value + 1), str(value))


@settings(max_examples=100, deadline=None)
@given(prediction=st.text(alphabet="0123456789+-*/^(){}[],.\\ fracsqrtx=<>%$", max_size=12))
def test_no_answer_makes_it_raise(prediction: str) -> None:
    assert equivalent(prediction, "1729") in (True, False)


def test_no_alarm_is_set_and_any_thread_may_judge() -> None:
    """math-verify's own time limit works in the main thread alone, and would take the event loop's place there."""
    before = signal.getsignal(signal.SIGALRM)
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(equivalent(r"2\sqrt{3}", r"\sqrt{12}")))
    thread.start()
    thread.join()
    assert verdicts == [True]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.alarm(0) == 0


def bare(text: str) -> str | None:
    """The answer that a row's text is, or that its one box holds; None for prose."""
    if "\\boxed" in text:
        return extract_answer(text) if text.count("\\boxed") == 1 else None
    inside = text.strip().strip("$")
    return None if "$" in inside or "\\[" in inside or "\\(" in inside or len(inside.split()) > 6 else inside


# Where we mean to differ from that library, or its verdict is no mathematics.
DIFFERENT = {
    ("1,22", "1.22"): "a decimal comma is a pair of numbers here",
    ("$11$", r"$x\approx11$"): "an approximation is not the value",
    ("$x = 1/3$", r"$x = 5+5+1 = 1/3 \approx 11$"): "5 + 5 + 1 is not 1/3",
    (r"$28\%$", "28 percent"): "a unit in words: rows of ours write signs",
    (r"$28\%$", r"$\boxed{28 percentage}"): "the same",
}


def test_math_verifys_own_pairs(shared_data: Path) -> None:
    lines = (shared_data / "grader" / "math_verify_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    judged = 0
    for row in map(json.loads, lines):
        gold, prediction = bare(row["gold"]), bare(row["pred"])
        if not row["equal"]:
            assert not equivalent(extract_answer(row["pred"]) or row["pred"], row["gold"]), row
        if gold is None or prediction is None or (row["gold"], row["pred"]) in DIFFERENT:
            continue
        judged += 1
        assert equivalent(prediction, gold) is row["equal"], row
    assert judged >= 45


def test_real_answers_equal_themselves_in_another_dress(shared_data: Path) -> None:
    for line in (shared_data / "aime" / "aime_2025.jsonl").read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)["output"]
        digits = "".join(filter(str.isdigit, truth))
        assert equivalent(f"{digits}.0", truth) and equivalent(truth, digits)
    for line in (shared_data / "math" / "math500.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert equivalent(extract_answer(row["solution"]), row["answer"]), row["unique_id"]
