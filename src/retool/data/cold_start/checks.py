"""The three checks of an answer: its format, its result, and its programs, which are run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from retool.data.outputs import changes_reasoning, same_output
from retool.formats import tags
from retool.formats.calls import is_text
from retool.formats.tags import Block, Kind
from retool.grading.answers import extract_answer
from retool.grading.equivalence import equivalent
from retool.protocols import Sandbox
from retool.types import ExecutionResult, ExecutionStatus

VERSION = 1
"""Raise it when a check changes: verdicts of older checks are then forgotten."""
INFRA_RETRIES = 2
# A chat template may have written the opening tag, so that the answer begins inside the thoughts.
_THOUGHT = re.compile(r"\s*(?:<think>)?(?:(?!<think>).)*?</think>\s*", re.DOTALL)
_FENCED_WHOLE = re.compile(r"\s*```[a-z]*\n(?P<inside>.*<answer>.*)\n```\s*", re.DOTALL)
_TELLING = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d|\.\d)[\w.]*|[^\W\d_]{2,}")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")


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


def without_thoughts(text: str) -> str:
    """The answer without a reasoning model's thoughts before it."""
    thought = _THOUGHT.match(text)
    return text[thought.end() :] if thought else text


def unwrap(text: str) -> str:
    """The answer without thoughts before it, and without a fence around the whole."""
    text = without_thoughts(text)
    fenced = _FENCED_WHOLE.fullmatch(text)
    return (fenced.group("inside") if fenced else text).strip()


def check_text(text: str, finish: str, truth: str, *, textual: bool = False) -> list[Block]:
    """Format and answer. What stands after the answer is a word to the reader, and is left out.

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
    blocks = _split(text)
    if not textual and not any(block.kind is Kind.CODE for block in blocks):
        raise RejectedError("format: no code")
    (place,) = (place for place, block in enumerate(blocks) if block.kind is Kind.ANSWER)
    prediction = extract_answer(blocks[place].text)
    if prediction is None:
        raise RejectedError("answer: no box")
    if not equivalent(prediction, truth):
        raise RejectedError("answer: wrong")
    return blocks[: place + 1]


def _split(text: str) -> list[Block]:
    if not is_text(text):
        raise RejectedError("format: half of a surrogate pair")
    try:
        return tags.split(text)
    except tags.TagError as error:
        raise RejectedError(f"format: {error.reason}") from None


async def check_programs(blocks: Sequence[Block], sandbox: Sandbox, timeout_s: float, *, session: str = "") -> Checked:
    """Run each program, and put its real output in the place of the written one. An output that says the same is
    confirmed; one that differs is replaced, unless the text after it leans on what was not printed
    (``outputs.changes_reasoning``).

    Args:
        session: not empty: the programs go on in one interpreter of this name; else each runs by itself.

    Raises:
        RejectedError: a program fails where none was written to fail, or the reasoning does not follow from its output.
        UndecidedError: the sandbox failed, several times.
    """
    for attempt in range(INFRA_RETRIES + 1):
        # A session that was lost stays lost, so that each attempt needs one of its own.
        own = f"{session}/{attempt}" if session else ""
        try:
            return await _run_all(blocks, sandbox, timeout_s, own)
        except UndecidedError:
            continue
        finally:
            if own:
                sandbox.release(own)
    raise UndecidedError


async def _run_all(blocks: Sequence[Block], sandbox: Sandbox, timeout_s: float, session: str) -> Checked:
    checked = Checked(list(blocks))
    code = ""
    for place, block in enumerate(blocks):
        if block.kind is Kind.CODE:
            code = block.text
        if block.kind is not Kind.OUTPUT:
            continue
        result = await sandbox.execute(code, timeout_s, session=session)
        if result.status is ExecutionStatus.INFRA:
            raise UndecidedError
        checked.statuses[result.status.value] += 1
        checked.seconds += result.duration_s
        checked.replaced += not _confirms(block.text, result, _after(blocks[place + 1 :]))
        checked.blocks[place] = Block(Kind.OUTPUT, result.text, tags.write_output(result.text))
    try:
        tags.split(checked.text)
    except tags.TagError:
        # It would end its own block, or open another one.
        raise RejectedError("execution: a tag in the output") from None
    return checked


def _confirms(written: str, result: ExecutionResult, after: str) -> bool:
    """Whether a run gave what was written; False where it gave something else that does no harm.

    Raises:
        RejectedError: it does harm.
    """
    if same_output(_plain(written), _plain(result.text)):
        return True
    if result.status is not ExecutionStatus.OK:
        raise RejectedError(f"execution: {result.status.value}")
    # "1,234" is one number or two, and neither reading may be harmed.
    told, real, said = _plain(written), _plain(result.text), _plain(after)
    if (
        changes_reasoning(told, real, said)
        or changes_reasoning(written, f"{result.text}\n{real}", after)
        or not _in_order(told, real, said)
    ):
        raise RejectedError("execution: mismatch")
    return False


def _in_order(written: str, real: str, after: str) -> bool:
    """Whether the real output holds what the text ``after`` takes up of the written one in the same order: else "a: 3,
    b: 4" would bear what follows from "a: 4, b: 3"."""
    said = set(_telling(after))
    known: dict[str, bool] = {}
    for piece in _telling(written):
        if piece not in known:
            known[piece] = piece in said or any(same_output(piece, other) for other in said)
    there = iter(_telling(real))
    return all(any(same_output(piece, other) for other in there) for piece in _telling(written) if known[piece])


def _telling(text: str) -> list[str]:
    return [piece.casefold().rstrip(".") for piece in _TELLING.findall(text)]


def _plain(text: str) -> str:
    """Numbers without thousands separators."""
    return _THOUSANDS.sub("", text)


def _after(blocks: Sequence[Block]) -> str:
    """What was written knowing the output: prose, programs and the answer, but no later output."""
    return " ".join(block.text for block in blocks if block.kind is not Kind.OUTPUT)
