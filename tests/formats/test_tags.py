from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.formats import tags
from retool.formats.tags import Kind, TagError, find_calls, is_open, join, split, split_turns, write_code, write_output

PIECES = ["</code>", "<code>", "```", "````", "\n", "'", '"', '"""', "'''", "#", " ", "x", "\\", "`", "</interpreter>"]
codes = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text()
FENCED = "<code>\n```python\n{}\n```\n</code>"


@settings(max_examples=500, deadline=None)
@given(code=codes, before=st.text().filter(lambda text: "<" not in text), after=codes)
def test_any_program_is_read_back(code: str, before: str, after: str) -> None:
    block = write_code(code)
    found = tags.find_program(before + block + after)
    assert found is not None
    assert (found.code, found.start, found.end) == (code, len(before), len(before) + len(block))
    assert not found.fault
    assert not is_open(before + block)


@settings(max_examples=300, deadline=None)
@given(text=codes)
def test_no_text_makes_it_raise(text: str) -> None:
    for call in find_calls(text):
        assert (call.code is None) != (call.error is None)
    assert is_open(text) in (True, False)
    for read in (split, split_turns):
        try:
            read(text)
        except TagError as error:
            assert error.reason


@settings(max_examples=300, deadline=None)
@given(text=codes)
def test_what_is_split_is_the_text_to_the_character(text: str) -> None:
    whole = text.replace("<", "") + write_code("print(1)") + " " + write_output("1") + "<answer>1</answer>" + "\n"
    assert "".join(block.raw for block in split(whole)) == whole


@pytest.mark.parametrize(
    "code",
    [
        "print('</code>')",
        'print("</code>", "</code>")',
        "# </code>\nprint(1)",
        'x = """\n</code>\n"""',
        "x = 'it\\'s </code>'",
        'f"{x}</code>"',
        "print('''\n```\n</code>''')",
        "s = '<code>\\n```python'",
        "",
        "\n",
        "a\n\n",
        "  indented",
        "\tprint(1)\r\n",
        "```",
        "````\n</code>",
    ],
)
def test_tags_in_a_program_are_its_own(code: str) -> None:
    block = write_code(code)
    assert [call.code or "" for call in find_calls(block)] == [code if code.strip() else ""]
    # Where the engine stops at the tag inside, the program is not over.
    for end in range(len(block) - len("\n</code>")):
        if block[:end].endswith("</code>") and "````" not in block:
            assert is_open(block[:end])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("I run it.\n" + FENCED.format("print(1)"), "print(1)"),
        ("<code>\n```python\nprint(1)\n</code>", "print(1)"),
        ("<code>\n```python\nprint(1)```</code>", "print(1)"),
        ("<code>```py\nprint(1)\n```</code>", "print(1)"),
        ("<code>\n```\nprint(1)\n```\n</code>", "print(1)"),
        ("<code>print(1)</code>", "print(1)"),
        ("<code>\nprint(1)\n</code>\n", "print(1)"),
        ("I use <code> tags: " + FENCED.format("print(1)"), "print(1)"),
        ("Between <code> and <code>print(1)</code>", "print(1)"),
        ("<code>\n```python\nprint('a\n```\n</code>", "print('a"),
        ('<code>\n```python\nx = """a\n```\n</code>', 'x = """a'),
    ],
)
def test_a_program_that_can_be_read_is_run(text: str, code: str) -> None:
    assert [call.code for call in find_calls(text)] == [code]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<code>\n```python\nprint(1)\n", "no closing </code>"),
        ("<code>\n```python\nprint('</code>", "no closing </code>"),
        ("I write <code> and stop", "no closing </code>"),
        ("print(1)\n</code>", "without <code>"),
        (FENCED.format(""), "empty"),
        ("<code></code>", "empty"),
        (FENCED.format("'\ud800'"), "surrogate"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    (call,) = find_calls(text)
    assert call.code is None
    assert call.error is not None and says in call.error


def test_no_call_without_a_tag() -> None:
    assert find_calls(r"No code. <answer>\boxed{1}</answer>") == []


GOOD = join("I count.", write_code("print(4)"), write_output("4"), "So:", tags.write_answer("4"))


def test_a_whole_answer_is_split() -> None:
    kinds = [(block.kind, block.text.strip()) for block in split(GOOD) if block.text.strip()]
    assert kinds == [
        (Kind.PROSE, "I count."),
        (Kind.CODE, "print(4)"),
        (Kind.OUTPUT, "4"),
        (Kind.PROSE, "So:"),
        (Kind.ANSWER, "4"),
    ]
    assert split("x <answer>4</answer> That is all.")


CODE, OUTPUT, ANSWER = write_code("print(4)"), write_output("4"), tags.write_answer("4")
BROKEN = {
    "unclosed <code>": "<code>\n```python\nprint(4)\n" + OUTPUT + ANSWER,
    "unclosed <interpreter>": CODE + "<interpreter>4" + ANSWER,
    "unclosed <answer>": CODE + OUTPUT + "<answer>4",
    "</code> without an opening tag": "print(4)</code>" + OUTPUT + ANSWER,
    "</interpreter> without an opening tag": CODE + OUTPUT + "</interpreter>" + ANSWER,
    "</answer> without an opening tag": CODE + OUTPUT + "4</answer>",
    "code without output": CODE + " I see. " + ANSWER,
    "two code blocks in a row": CODE + "\n" + CODE + OUTPUT + ANSWER,
    "output before code": OUTPUT + CODE + OUTPUT + ANSWER,
    "no answer": CODE + OUTPUT + "It is 4.",
    "empty answer": CODE + OUTPUT + "<answer>\n\n</answer>",
    "a block after the answer": CODE + OUTPUT + ANSWER + CODE + OUTPUT,
    "code without a fence (```python)": "<code>print(4)</code>" + OUTPUT + ANSWER,
    "code without its closing fence": "<code>\n```python\nprint(4)\n</code>" + OUTPUT + ANSWER,
    "code in 'js', not in Python": "<code>\n```js\n4\n```\n</code>" + OUTPUT + ANSWER,
    "empty code": write_code(" ") + OUTPUT + ANSWER,
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_answer_says_how(reason: str) -> None:
    with pytest.raises(TagError) as found:
        split(BROKEN[reason])
    assert found.value.reason == reason
    assert 0 <= found.value.position <= len(BROKEN[reason])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CODE + OUTPUT + OUTPUT + ANSWER, "output before code"),
        (ANSWER + ANSWER, "a block after the answer"),
        (CODE + "<interpreter>4<interpreter>4</interpreter>" + ANSWER, "unclosed <interpreter>"),
        (CODE, "code without output"),
        ("", "no answer"),
        ("Use <code> for this." + ANSWER, "unclosed <code>"),
    ],
)
def test_more_broken_answers(text: str, reason: str) -> None:
    with pytest.raises(TagError, match=reason):
        split(text)


def test_turns_are_split_at_their_programs() -> None:
    assert split_turns("I.\n" + CODE + "\n\n" + OUTPUT + "\n\n\nSo.") == [("I.\n" + CODE, "4"), ("\nSo.", None)]
    assert split_turns("No code.") == [("No code.", None)]
    assert split_turns(CODE + "<interpreter></interpreter>") == [(CODE, ""), ("", None)]
    with pytest.raises(TagError, match="code without output"):
        split_turns(CODE + " So.")


def test_parts_are_joined_by_one_empty_line() -> None:
    assert join("a", "b") == "a\n\nb"
    assert join("a\n", "b") == "a\nb"
    assert join("", "b", "") == "b"
