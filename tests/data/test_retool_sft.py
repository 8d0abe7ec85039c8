"""ReTool-SFT's published form: what comes out, and what is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from retool.data.prompts import prompt_messages
from retool.data.retool_sft import Converted, RowError, convert, extract_question, to_messages, to_text
from retool.formats import tags
from retool.formats.tags import write_answer, write_code, write_output

PROMPT = (
    "Use the tool.\n\n*user question:*\n{}\n\nRemember to place the final answer in the last part using the format: X"
)
ASKED = PROMPT.format("What is 2+2?")
CODE, OUTPUT, ANSWER = write_code("print(4)"), write_output("4"), write_answer(r"\boxed{4}")
GOOD = tags.join("I count.", CODE, OUTPUT, "So:", ANSWER)


def row(response: Any = GOOD, prompt: Any = ASKED) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}


def test_a_row_becomes_calls_and_results() -> None:
    found = convert(row())
    assert (found.question, found.answer, found.response) == ("What is 2+2?", "4", GOOD)
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": "print(4)"}}}
    assert found.messages() == [
        *prompt_messages("What is 2+2?"),
        {"role": "assistant", "content": "I count.", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "So:\n\n<answer>\n\\boxed{4}\n</answer>"},
    ]
    assert found.messages("tags") == [*prompt_messages("What is 2+2?"), {"role": "assistant", "content": GOOD}]


def synthetic(rng: random.Random) -> str:
    """A response in the published form, with what such texts hold: LaTeX, several lines, tags in strings, Unicode."""
    words = ["Let", "x = 3", r"\frac{1}{2}", "é", "the sum", "$a<b$", "(1 < 2)", "步骤", "`n`", "\n", "**so**"]
    programs = ["print({})", "import math\n\nprint(math.gcd({}, 6))", "s = '</code>'\nprint(s, {})", "# é </code>\n{}"]
    printed = ["{}", "[1, {}]", "", "a\n\n{}", "Traceback (most recent call last):\n  …\nNameError: x{}", " {} "]
    parts = []
    for _ in range(rng.randint(0, 4)):
        parts.append(" ".join(rng.choices(words, k=rng.randint(0, 8))).strip())
        parts.append(write_code(rng.choice(programs).format(rng.randint(0, 99))))
        parts.append(write_output(rng.choice(printed).format(rng.randint(0, 99))))
    parts += [rng.choice(["", "So:", "Thus\n\nit is"]), write_answer(rf"\boxed{{{rng.randint(0, 999)}}}")]
    return tags.join(*parts)


def test_2000_rows_round_trip_exactly() -> None:
    rng = random.Random(0)
    for number in range(2000):
        question, response = f"Question {number}: {rng.random()}?\nIt is *hard*.", synthetic(rng)
        found = convert(row(response, PROMPT.format(question)))
        assert (found.question, found.response) == (question, response)
        messages = found.messages()
        assert to_text(messages[2:]) == response
        assert to_messages(tags.split(to_text(messages[2:]))) == messages[2:]
        assert len([m for m in messages if m["role"] == "tool"]) == response.count("<interpreter>")


def test_any_white_space_is_kept_in_the_string_and_trimmed_in_the_messages() -> None:
    rng = random.Random(1)
    for _ in range(200):
        loose = re.sub("\n\n(?=<)", lambda _: rng.choice(["\n", "\n\n\n", " \n ", ""]), synthetic(rng))
        found = convert(row(loose))
        assert found.response == loose
        strict = convert(row(to_text(found.messages()[2:])))
        assert strict.messages() == found.messages()


def test_the_published_prompt_and_sample(shared_data: Path) -> None:
    prompt = json.loads((shared_data / "retool_sft" / "prompt_template.json").read_text())["retool"]
    sample = json.loads((shared_data / "retool_sft" / "converted_sample_rewrapped.json").read_text())["messages"]
    question = extract_question(sample[0]["content"])
    assert question.startswith("There") and question.endswith("Eglish class?")
    turns = [{**message, "content": message["content"].strip()} for message in sample[1:]]
    found = convert(row(to_text(turns), prompt.format(query=question)))
    assert found.question == question
    assert found.answer == "3"
    assert found.messages()[2:] == turns


BROKEN: list[tuple[str, Any]] = [
    ("no 'messages'", ["messages"]),
    ("no 'messages'", {"conversation": []}),
    ("no 'messages'", {"messages": "user: What is 2+2?"}),
    ("a message that is no object", {"messages": ["What is 2+2?", GOOD]}),
    ("not one user message and one assistant message", {"messages": []}),
    ("not one user message and one assistant message", {"messages": [row()["messages"][0]]}),
    ("not one user message and one assistant message", {"messages": row()["messages"][::-1]}),
    ("a message whose content is no text", row(None)),
    ("a message whose content is no text", row(prompt=[{"type": "text"}])),
    ("half of a surrogate pair", row(GOOD.replace("I count", "\ud800"))),
    ("half of a surrogate pair", row(prompt=PROMPT.format("\udfff"))),
    ("empty response", row(" \n")),
    ("no '*user question:*' in the prompt", row(prompt="What is 2+2?")),
    ("empty question", row(prompt=PROMPT.format(" "))),
    (r"answer without \boxed{}", row(CODE + OUTPUT + write_answer("4"))),
    (r"answer without \boxed{}", row(CODE + OUTPUT + write_answer(r"\boxed{}"))),
    ("unclosed <code>", row("<code>\n```python\nprint(4)\n" + OUTPUT + ANSWER)),
    ("unclosed <interpreter>", row(CODE + "<interpreter>4" + ANSWER)),
    ("unclosed <answer>", row(CODE + OUTPUT + r"<answer>\boxed{4}")),
    ("</code> without an opening tag", row("print(4)</code>" + OUTPUT + ANSWER)),
    ("</interpreter> without an opening tag", row(CODE + "4</interpreter>" + ANSWER)),
    ("</answer> without an opening tag", row(CODE + OUTPUT + r"\boxed{4}</answer>")),
    ("code without output", row(CODE + ANSWER)),
    ("code without output", row(CODE + "It prints 4." + OUTPUT + ANSWER)),
    ("two code blocks in a row", row(CODE + CODE + OUTPUT + ANSWER)),
    ("output before code", row(OUTPUT + ANSWER)),
    ("output before code", row(CODE + OUTPUT + OUTPUT + ANSWER)),
    ("no answer", row(CODE + OUTPUT + r"\boxed{4}")),
    ("empty answer", row(CODE + OUTPUT + "<answer> </answer>")),
    ("a block after the answer", row(CODE + OUTPUT + ANSWER + ANSWER)),
    ("code without a fence (```python)", row("<code>print(4)</code>" + OUTPUT + ANSWER)),
    ("code without its closing fence", row("<code>\n```python\nprint(4)\n</code>" + OUTPUT + ANSWER)),
    ("code in 'bash', not in Python", row("<code>\n```bash\nls\n```\n</code>" + OUTPUT + ANSWER)),
    ("empty code", row(write_code("") + OUTPUT + ANSWER)),
]


@pytest.mark.parametrize(("reason", "broken"), BROKEN, ids=[f"{i}-{r}" for i, (r, _) in enumerate(BROKEN)])
def test_a_broken_row_says_how(reason: str, broken: Any) -> None:
    with pytest.raises(RowError) as found:
        convert(broken)
    assert str(found.value) == reason


def test_a_row_without_code_is_a_row() -> None:
    found: Converted = convert(row("It is 4.\n\n" + ANSWER))
    assert [message["role"] for message in found.messages()] == ["system", "user", "assistant"]
