"""The three checks of an answer: its format, its result, and its programs, which are run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from retool.data.outputs import changes_reasoning, same_output
from retool.formats import tags
from retool.formats.tags import Block, Kind
from retool.grading.answers import extract_answer
from retool.grading.equivalence import equivalent
from retool.protocols import Sandbox
from retool.types import ExecutionResult, ExecutionStatus

INFRA_RETRIES = 2
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_FENCED_WHOLE = re.compile(r"\s*```[a-z]*\n(?P<inside>.*<answer>.*)\n```\s*", re.DOTALL)


class RejectedError(Exception):
    """The answer is not kept; its text is one of a few reasons that can be counted, e.g. ``answer: wrong``."""


class UndecidedError(Exception):
    """The sandbox failed, not the answer: the next start checks it again."""


@dataclass
class Checked:
    """An answer that holds, with real outputs."""

    blocks: list[Block]
    statuses: Counter[str] = field(default_factory=Counter)
    """Of its programs' runs."""
    replaced: int = 0
    """Outputs that were written otherwise, without harm to the reasoning."""
    seconds: float = 0.0
    """Of all its programs."""

    @property
    def text(self) -> str:
        return "".join(block.raw for block in self.blocks).strip()

    @property
    def programs(self) -> list[str]:
        return [block.text for block in self.blocks if block.kind is Kind.CODE]


def unwrap(text: str) -> str:
    """The answer without a reasoning model's thoughts before it, and without a fence around the whole."""
    text = _THOUGHT.sub("", text, count=1) if _THOUGHT.match(text) else text
    fenced = _FENCED_WHOLE.fullmatch(text)
    return (fenced.group("inside") if fenced else text).strip()


def check_text(text: str, finish: str, truth: str, *, textual: bool = False) -> list[Block]:
    """Format and answer.

    Args:
        finish: the teacher's finish_reason.
        textual: keep an answer without a program.

    Raises:
        RejectedError: says why.
    """
    if finish == "length":
        raise RejectedError("truncated")
    text = unwrap(text)
    if not text:
        raise RejectedError("empty")
    try:
        blocks = tags.split(text)
    except tags.TagError as error:
        raise RejectedError(f"format: {error.reason}") from None
    if not textual and not any(block.kind is Kind.CODE for block in blocks):
        raise RejectedError("format: no code")
    (answer,) = (block.text for block in blocks if block.kind is Kind.ANSWER)
    prediction = extract_answer(answer)
    if prediction is None:
        raise RejectedError("answer: no box")
    if not equivalent(prediction, truth):
        raise RejectedError("answer: wrong")
    return blocks


async def check_programs(blocks: Sequence[Block], sandbox: Sandbox, timeout_s: float) -> Checked:
    """Run each program by itself, and put its real output in the place of the written one. An output that says the same
    is confirmed; one that differs is replaced, unless the text after it leans on what was not printed
    (``outputs.changes_reasoning``).

    Raises:
        RejectedError: a program fails where none was written to fail, or the reasoning does not follow from its output.
        UndecidedError: the sandbox failed.
    """
    checked = Checked(list(blocks))
    code = ""
    for place, block in enumerate(blocks):
        if block.kind is Kind.CODE:
            code = block.text
        if block.kind is not Kind.OUTPUT:
            continue
        result = await _run(sandbox, code, timeout_s)
        checked.statuses[result.status.value] += 1
        checked.seconds += result.duration_s
        real = result.text
        if not same_output(block.text, real):
            if result.status is not ExecutionStatus.OK:
                raise RejectedError(f"execution: {result.status.value}")
            if changes_reasoning(block.text, real, _after(blocks[place + 1 :])):
                raise RejectedError("execution: mismatch")
            checked.replaced += 1
        checked.blocks[place] = Block(Kind.OUTPUT, real, tags.write_output(real))
    return checked


async def _run(sandbox: Sandbox, code: str, timeout_s: float) -> ExecutionResult:
    for _ in range(INFRA_RETRIES + 1):
        result = await sandbox.execute(code, timeout_s)
        if result.status is not ExecutionStatus.INFRA:
            return result
    raise UndecidedError


def _after(blocks: Sequence[Block]) -> str:
    """What was written knowing the output: prose, programs and the answer, but no later output."""
    return " ".join(block.text for block in blocks if block.kind is not Kind.OUTPUT)
