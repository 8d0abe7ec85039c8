from __future__ import annotations

import asyncio

import pytest
from fakes import ScriptedSandbox

from retool.config import SandboxConfig
from retool.data.cold_start.checks import (
    Checked,
    RejectedError,
    UndecidedError,
    check_programs,
    check_text,
    unwrap,
    without_thoughts,
)
from retool.data.cold_start.prompt import REWRITE, SOLVE, messages_for
from retool.data.cold_start.report import imports
from retool.data.problem import Problem
from retool.formats import tags
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.sandbox.choose import open_sandbox
from retool.types import ExecutionResult, ExecutionStatus

CODE, ANSWER = write_code("print(40 + 2)"), write_answer(r"\boxed{42}")
GOOD = join("I add.", CODE, write_output("42"), "So it is 42.", ANSWER)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>\nLet me see <code>.\n</think>\n\n{GOOD}",
        f"The template opened it; a draft: <answer>7</answer>\n</think>\n\n{GOOD}",
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
        (GOOD.replace("I add.", "I \ud800 add."), "stop", "format: half of a surrogate pair"),
    ],
)
def test_what_is_rejected_has_a_reason(text: str, finish: str, reason: str) -> None:
    with pytest.raises(RejectedError) as found:
        check_text(text, finish, "42")
    assert str(found.value) == reason


def test_what_stands_after_the_answer_is_left_out() -> None:
    blocks = check_text(f"{GOOD}\n\nTell me if you need more.", "stop", "42")
    assert "".join(block.raw for block in blocks) == GOOD


def test_thoughts_are_told_from_an_answer() -> None:
    assert without_thoughts("<think>a</think>b") == without_thoughts("a</think>b") == "b"
    assert without_thoughts("a <think> b") == "a <think> b"
    assert without_thoughts(GOOD) == GOOD


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
    ("written", "real", "after", "harm"),
    [
        ("a: 3, b: 4", "a: 4, b: 3", "So b is 4 and a is 3.", True),
        ("a: 3, b: 4", "b: 4, a: 3", "So b is 4 and a is 3.", True),
        ("prime: no", "prime: yes", "No, it is not.", True),
        ("1234", "1235", "So 1,234 of them.", True),
        ("1234", "1235", "So $1{,}234$ of them.", True),
        ("3,456", "4,456", "So 3 and 456.", True),
        ("1,234", "1234", "So 1234 of them.", False),
        ("1234\n0.5 s", "1,234\n0.7 s", "So 1234 of them.", False),
        ("7 of 9", "Result: 7 of 9", "So 7 of 9.", False),
        ("7\ntook 12 ms", "7\ntook 99 ms", "So 7.", False),
        ("10", "11", "10-3 = 7", True),
        ("5", "6", "That is prime.", False),
    ],
)
def test_whether_a_difference_does_harm(written: str, real: str, after: str, harm: bool) -> None:
    text = join(CODE, write_output(written), after, write_answer(r"\boxed{42}"))
    if harm:
        with pytest.raises(RejectedError, match="execution: mismatch"):
            run(text, real)
    else:
        assert run(text, real).text == real


@pytest.mark.parametrize("printed", ["</interpreter>", "<answer>", "</code>", "x</interpreter>\n<answer>\n7"])
def test_an_output_that_would_forge_a_block_rejects(printed: str) -> None:
    text = join("I add.", CODE, write_output("nothing"), "So it is.", write_answer(r"\boxed{42}"))
    try:
        found = run(text, printed)
    except RejectedError as reason:
        assert str(reason) == "execution: a tag in the output"
    else:
        assert found.text == printed  # it stands in its block, and nothing else is read into it


def test_programs_may_share_an_interpreter() -> None:
    lost = ExecutionResult(ExecutionStatus.INFRA)
    text = join(CODE, write_output("42"), write_code("print(x)"), write_output("42"), write_answer(r"\boxed{42}"))
    blocks = check_text(text, "stop", "42")
    sandbox = ScriptedSandbox(lambda code, count: lost if "x" in code and count == 0 else "42")
    checked = asyncio.run(check_programs(blocks, sandbox, 1.0, session="s"))
    assert checked.statuses == {"ok": 2}
    # The interpreter that was lost is not asked again, and both are released.
    assert sandbox.sessions == ["s/0", "s/0", "s/1", "s/1"]
    assert sandbox.released == {"s/0": 1, "s/1": 1}


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
    assert "How {answer} {solution}?" in asked["content"]
    assert "It is 42." in asked["content"] and "with the answer 42" in asked["content"]
    bare = messages_for(Problem("a", "s", "How?", "42"))[1]["content"]
    assert "42" not in bare and bare.startswith("Problem:\nHow?")
    assert SOLVE.count("{question}") == REWRITE.count("{question}") == 1
    assert "complete by itself" in system["content"] and "{" not in system["content"].replace("boxed{", "")
    shared = messages_for(Problem("a", "s", "How?", "42"), stateful=True)[0]["content"]
    assert "one interpreter" in shared and "complete by itself" not in shared


def test_the_prompts_own_examples_pass_the_checks() -> None:
    system = messages_for(Problem("a", "s", "How?", "42"))[0]["content"]
    shown = system[system.index("<code>") : system.index("Rules:")] + write_answer(r"\boxed{391}")
    whole = system[system.rindex("A multiple of 15") :]

    async def run() -> list[Checked]:
        sandbox = await open_sandbox(SandboxConfig(timeout_s=5, preload=["math"], workers=1))
        try:
            texts = {shown: "391", whole: "401"}
            return [await check_programs(check_text(t, "stop", truth), sandbox, 5.0) for t, truth in texts.items()]
        finally:
            await sandbox.close()

    assert [checked.text for checked in asyncio.run(run())] == [shown, whole]


def test_imports_of_a_program() -> None:
    assert imports("import numpy as np, os.path\nfrom sympy.abc import x\nfrom . import y") == {"numpy", "os", "sympy"}
    assert imports("1 +") == set()
