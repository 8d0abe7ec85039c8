from __future__ import annotations

import asyncio

import pytest
from fakes import ScriptedSandbox

from retool.data.cold_start.checks import RejectedError, UndecidedError, check_programs, check_text, unwrap
from retool.data.cold_start.prompt import REWRITE, SOLVE, SYSTEM, messages_for
from retool.data.cold_start.report import imports
from retool.data.problem import Problem
from retool.formats import tags
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.types import ExecutionResult, ExecutionStatus

CODE, ANSWER = write_code("print(40 + 2)"), write_answer(r"\boxed{42}")
GOOD = join("I add.", CODE, write_output("42"), "So it is 42.", ANSWER)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>\nLet me see <code>.\n</think>\n\n{GOOD}",
        f"```\n{GOOD}\n```",
        f"```markdown\n{GOOD}\n```\n",
        f"  {GOOD}\n",
    ],
)
def test_an_answer_is_taken_out_of_its_wrapping(text: str) -> None:
    assert unwrap(text) == GOOD
    assert "".join(block.raw for block in check_text(text, "stop", "42")) == GOOD


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "length", "truncated"),
        ("", "stop", "empty"),
        ("<think>hm</think>", "stop", "empty"),
        (join("x", CODE, ANSWER), "stop", "format: code without output"),
        (join("It is 42.", ANSWER), "stop", "format: no code"),
        (join(CODE, write_output("42"), "It is 42."), "stop", "format: no answer"),
        (join(CODE, write_output("42"), write_answer("42")), "stop", "answer: no box"),
        (join(CODE, write_output("42"), write_answer(r"\boxed{43}")), "stop", "answer: wrong"),
        (join(CODE, write_output("42"), write_answer(r"\boxed{42 or 43}")), "stop", "answer: wrong"),
    ],
)
def test_what_is_rejected_has_a_reason(text: str, finish: str, reason: str) -> None:
    with pytest.raises(RejectedError) as found:
        check_text(text, finish, "42")
    assert str(found.value) == reason


def test_an_answer_without_code_may_be_wanted() -> None:
    assert check_text(join("It is 42.", ANSWER), "stop", "42", textual=True)


def run(text: str, answer: ExecutionResult | str) -> tags.Block:
    sandbox = ScriptedSandbox(lambda code, count: answer)
    checked = asyncio.run(check_programs(check_text(text, "stop", "42"), sandbox, 1.0))
    assert "".join(block.raw for block in check_text(checked.text, "stop", "42")) == checked.text
    return next(block for block in checked.blocks if block.kind is tags.Kind.OUTPUT)


def test_a_real_output_confirms_or_replaces_the_written_one() -> None:
    assert run(GOOD, "42\n").text == "42"
    assert run(GOOD, " 42.0 ").text == " 42.0 "
    harmless = GOOD.replace("<interpreter>\n42", "<interpreter>\n42\nin 0.01 s")
    assert run(harmless, "42\nin 0.03 s").text == "42\nin 0.03 s"


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("43", "execution: mismatch"),
        ("", "execution: mismatch"),
        (ExecutionResult(ExecutionStatus.ERROR, stderr="ValueError"), "execution: error"),
        (ExecutionResult(ExecutionStatus.TIMEOUT, stdout="42"), "execution: timeout"),
        (ExecutionResult(ExecutionStatus.MEMORY), "execution: memory"),
    ],
)
def test_a_run_that_does_not_bear_the_reasoning_rejects(result: ExecutionResult | str, reason: str) -> None:
    with pytest.raises(RejectedError) as found:
        run(GOOD, result)
    assert str(found.value) == reason


def test_an_error_that_was_written_is_confirmed() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nZeroDivisionError: division by zero'
    text = join(write_code("1/0"), write_output(trace), "It fails, so by hand: 42.", ANSWER)
    real = ExecutionResult(ExecutionStatus.ERROR, stderr=trace.replace("x.py", "/w/main.py"))
    assert run(text, real).text == real.text


def test_a_later_program_may_lean_on_an_output() -> None:
    text = join(CODE, write_output("42"), write_code("print(42 * 1)"), write_output("42"), write_answer(r"\boxed{42}"))
    sandbox = ScriptedSandbox(lambda code, count: "41" if "40" in code else "42")
    with pytest.raises(RejectedError, match="mismatch"):
        asyncio.run(check_programs(check_text(text, "stop", "42"), sandbox, 1.0))


def test_a_lost_run_is_tried_again_and_never_rejects() -> None:
    lost = ExecutionResult(ExecutionStatus.INFRA)
    blocks = check_text(GOOD, "stop", "42")
    sandbox = ScriptedSandbox(lambda code, count: lost if count < 2 else "42")
    assert asyncio.run(check_programs(blocks, sandbox, 1.0)).statuses == {"ok": 1}
    with pytest.raises(UndecidedError):
        asyncio.run(check_programs(blocks, ScriptedSandbox(lambda code, count: lost), 1.0))


def test_what_is_asked() -> None:
    system, asked = messages_for(Problem("a", "s", "How {answer} {solution}?", "42", "It is <<6*7=42>>42."))
    assert system["content"] == SYSTEM and "How {answer} {solution}?" in asked["content"]
    assert "It is 42." in asked["content"] and "with the answer 42" in asked["content"]
    bare = messages_for(Problem("a", "s", "How?", "42"))[1]["content"]
    assert "42" not in bare and bare.startswith("Problem:\nHow?")
    assert SOLVE.count("{question}") == REWRITE.count("{question}") == 1
    # The prompt's own example keeps the grammar that it asks for.
    example = SYSTEM[SYSTEM.index("<code>") : SYSTEM.index("Rules:")] + SYSTEM[SYSTEM.rindex("<answer>\n") :]
    assert check_text(example.partition("\n\nWrite the example")[0], "stop", "391")


def test_imports_of_a_program() -> None:
    assert imports("import numpy as np, os.path\nfrom sympy.abc import x\nfrom . import y") == {"numpy", "os", "sympy"}
    assert imports("1 +") == set()
