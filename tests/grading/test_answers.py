from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.grading.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"It is \boxed{4}.", "4"),
        (r"\boxed{3} no, \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("\\boxed{\n 7 \n}", "7"),
        (r"\boxed{5}} and {", "5"),
        (r"} { \boxed{5}", "5"),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"\boxed{}", None),
        (r"\boxed{4} \boxed{ }", None),
        (r"\boxed{5", None),
        (r"boxed{5}", None),
        (r"\boxed5", None),
        (r"\\boxed{5}", None),  # a line break in LaTeX, or the inside of a program's string
        ("the answer is 4", None),
        ("", None),
    ],
)
def test_the_last_balanced_box(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


balanced = st.recursive(
    st.text(alphabet="ab1 "), lambda inner: st.lists(inner).map(lambda parts: "{" + "".join(parts) + "}")
)


@given(before=st.text(alphabet="ab{} "), answer=balanced.filter(str.strip), after=st.text(alphabet="ab} "))
def test_any_balanced_answer_is_found_in_any_prose(before: str, answer: str, after: str) -> None:
    assert extract_answer(f"{before}\\boxed{{{answer}}}{after}") == answer.strip()


def test_a_text_of_nothing_but_open_boxes_is_read_once() -> None:
    assert extract_answer(r"\boxed{" * 200_000) is None
    assert extract_answer(r"\boxed{" * 200_000 + "5}") == "5"
