"""What makes two questions the same problem: every copy, and no other problem."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.data.cleaning import fingerprint, normalise


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Compute 2⁵.", "Compute 25."),
        ("Compute 2⁵⁰.", "Compute 250."),
        ("a₁2", "a12"),
        ("the sum of 1 2", "the sum of 12"),
        ("3 4", "34"),
        (r"1\quad 2", "12"),
        (r"1~2", "12"),
        (r"1\ 2", "12"),
        ("x = -1", "x = 1"),
        ("1.5", "15"),
        ("1/2", "12"),
        ("3!", "3"),
    ],
)
def test_numbers_that_differ_are_not_the_same(ours: str, theirs: str) -> None:
    assert normalise(ours) != normalise(theirs)
    assert fingerprint(ours) != fingerprint(theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Compute 2⁵.", "compute $2^5$."),
        ("Compute 2⁵⁰.", "compute $2^{50}$."),
        ("a₁₂", "a_{12}"),
        ("1 \t\n 2", "1 2"),
        (r"1\,000", "1000"),
        (r"a\quad b", "a b"),
        ("$1$  $2$", r"\(1\) \(2\)"),
        ("a & b \\\\ \n c & d", "a&b\\\\c&d"),
        (r"a \\ (b)", r"a\\(b)"),
    ],
)
def test_copies_of_a_problem_are(ours: str, theirs: str) -> None:
    assert normalise(ours) == normalise(theirs)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.lists(st.integers(0, 999), min_size=1, max_size=5))
def test_lists_of_numbers_are_told_apart(ours: list[int], theirs: list[int]) -> None:
    one, other = (normalise(" ".join(map(str, numbers))) for numbers in (ours, theirs))
    assert (one == other) == (ours == theirs)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_normalised_text_stays_so_about_white_space(text: str) -> None:
    assert normalise(f"  {text}\n") == normalise(text)
