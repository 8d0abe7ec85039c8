from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.formats.calls import TOOL_NAME, find_calls


def call(code: object, name: str = TOOL_NAME) -> str:
    payload = json.dumps({"name": name, "arguments": {"code": code}}, ensure_ascii=False)
    return f"<tool_call>\n{payload}\n</tool_call>"


def test_calls_come_in_order_with_what_stood_between_their_tags() -> None:
    found = find_calls(f"First.\n{call('print(1)')} and\n{call('print(2)')}")
    assert [(c.code, c.error) for c in found] == [("print(1)", None), ("print(2)", None)]
    assert json.loads(found[0].raw)["arguments"] == {"code": "print(1)"}


@pytest.mark.parametrize("text", ["", "no call", "</tool_call>", "a </tool_call> b <tool_ call>", "<tool_calls>"])
def test_text_without_a_call(text: str) -> None:
    assert find_calls(text) == []


@given(st.lists(st.text() | st.sampled_from(["</tool_call>", "<tool_call>", "x = '<tool_call>{}</tool_call>'"])))
def test_any_code_is_found_as_it_was_written(codes: list[str]) -> None:
    text = "prose ".join(call(code) for code in codes)
    assert [c.code for c in find_calls(text)] == codes


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ('{"name": "code_interpreter", "arguments": {"code": "x"}', "not valid JSON"),
        ("print(1)", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"name": "code_interpreter", "arguments": {"code": "a\nb"}}', "line break"),
        ('{"name": "python", "arguments": {"code": "x"}}', "unknown function 'python'"),
        ('{"arguments": {"code": "x"}}', "unknown function"),
        ('{"name": ["code_interpreter"], "arguments": {"code": "x"}}', "unknown function"),
        ('{"name": "code_interpreter"}', "missing"),
        ('{"name": "code_interpreter", "arguments": {}}', "missing"),
        ('{"name": "code_interpreter", "arguments": "x"}', "missing"),
        ('{"name": "code_interpreter", "arguments": {"code": 5}}', "must be a string, not int"),
        ('{"name": "code_interpreter", "arguments": {"code": null}}', "must be a string"),
        ('["code_interpreter"]', "JSON object"),
        ('{"name": "code_interpreter", "arguments": {"code": "\\ud800"}}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5_000, "number is too long"),
    ],
)
def test_what_is_wrong_is_said_and_the_next_call_still_found(inside: str, says: str) -> None:
    broken, good = find_calls(f"<tool_call>{inside}</tool_call>{call('print(2)')}")
    assert broken.code is None
    assert broken.error is not None and says in broken.error
    assert broken.raw == inside
    assert good.code == "print(2)"


@pytest.mark.parametrize("rest", ["", '\n{"name": "code_interpreter", "arguments": {"code": "x"}}', '{"name'])
def test_an_unclosed_call_is_malformed(rest: str) -> None:
    first, last = find_calls(f"{call('1')}<tool_call>{rest}")
    assert first.code == "1"
    assert last.code is None and "closing </tool_call>" in str(last.error)
    assert last.raw == rest


@given(st.text(alphabet='{}[]"\\, :<tool_call>/namecodearguments'))
def test_no_text_makes_it_raise(text: str) -> None:
    for found in find_calls(f"<tool_call>{text}"):
        assert (found.code is None) != (found.error is None)
