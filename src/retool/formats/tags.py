r"""The paper's tags in text: ``<code>`` around a fenced program, ``<interpreter>`` around its output, ``<answer>``.

::

    I count them.

    <code>
    ```python
    print(6 * 7)
    ```
    </code>

    <interpreter>
    42
    </interpreter>

    <answer>
    \boxed{42}
    </answer>

A program may spell the tags itself. So a block ends at a closing fence on a line of its own with ``</code>`` after it,
or at a ``</code>`` that is neither in a string nor in a comment; a block that is fenced with more than three backticks
ends at its own fence alone, which lets any text be written as a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from retool.formats.calls import is_text
from retool.types import ToolCall

CODE_OPEN, CODE_CLOSE = "<code>", "</code>"
OUTPUT_OPEN, OUTPUT_CLOSE = "<interpreter>", "</interpreter>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
BETWEEN = "\n\n"
"""Between a block and what stands beside it."""

_FENCE = 3
_TAG = re.compile(r"</?(?:code|interpreter|answer)>")
_FENCED = re.compile(r"<code>\s*(?P<fence>`{3,})[ \t]*(?P<language>[\w+-]*)[ \t]*(?:\n|(?=```))")
_OUTPUT = re.compile(r"\s*<interpreter>")
_BREAKS = re.compile(r"\n{0,2}")
_PYTHON = ("", "python", "py", "python3")
# What Python reads as one piece: a comment, a whole string, or a string that is still open at the end.
_PIECES = re.compile(
    r"""
    \#[^\n]*
    | (?P<triple>\"{3}|'{3}) (?:\\.|(?!(?P=triple))[^\\])* (?P=triple)?
    | (?P<single>["']) (?:\\.|(?!(?P=single))[^\\\n])* (?:(?P=single)|(?=\n)|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)


class Program(NamedTuple):
    """A code block found in a text."""

    code: str
    start: int
    end: int
    """Behind ``</code>``."""
    fault: str = ""
    """What is wrong with how it is written, though it can be read."""


def write_code(code: str) -> str:
    """``code`` as a block that ``find_program`` reads back to the very same code."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    for size in (_FENCE, max(_FENCE, longest) + 1):
        fence = "`" * size
        block = f"{CODE_OPEN}\n{fence}python\n{code}\n{fence}\n{CODE_CLOSE}"
        found = find_program(block)
        if found and found.code == code and found.end == len(block):
            return block
    raise AssertionError("a fence that the code does not hold ends a block")


def write_output(text: str) -> str:
    """What a program printed, as a block."""
    return f"{OUTPUT_OPEN}\n{text}\n{OUTPUT_CLOSE}"


def join(*parts: str) -> str:
    """Prose and blocks, one after the other, with an empty line between two where there is no line break yet."""
    text = ""
    for part in parts:
        text += part if not part or not text or text.endswith("\n") else BETWEEN + part
    return text


def write_answer(text: str) -> str:
    """The final answer, as a block."""
    return f"{ANSWER_OPEN}\n{text}\n{ANSWER_CLOSE}"


def find_program(text: str, position: int = 0) -> Program | None:
    """The first code block that begins at ``position`` or later, and is closed; None where there is none.

    A ``<code>`` with a fence after it goes before one without: prose may name the tag.
    """
    fenced = _FENCED.search(text, position)
    if fenced:
        return _read_fenced(text, fenced)
    close = text.find(CODE_CLOSE, position)
    start = text.rfind(CODE_OPEN, position, max(close, position))
    if start < 0:
        return None
    code = text[start + len(CODE_OPEN) : close].strip("\n")
    return Program(code, start, close + len(CODE_CLOSE), "code without a fence (```python)")


def _read_fenced(text: str, opened: re.Match[str]) -> Program | None:
    fence, body = opened.group("fence"), text[opened.end() :]
    language = opened.group("language")
    fault = "" if language.lower() in _PYTHON else f"code in {language!r}, not in Python"
    own_line = re.search(rf"(?:\A|\n)[ \t]*{fence}[ \t]*\s*{CODE_CLOSE}", body)
    first = own_line.end() - len(CODE_CLOSE) if own_line else len(body)
    if len(fence) == _FENCE:
        close = _close_outside_strings(body[:first])
        if close is not None:
            code, found_fence = _without_fence(body[:close])
            fault = fault or ("" if found_fence else "code without its closing fence")
            return Program(code, opened.start(), opened.end() + close + len(CODE_CLOSE), fault)
    if own_line is None:
        return None
    return Program(body[: own_line.start()], opened.start(), opened.end() + own_line.end(), fault)


def _without_fence(code: str) -> tuple[str, bool]:
    """Code before ``</code>`` less its closing fence, which may stand on the code's own last line, if there is one."""
    bare = code.rstrip()
    if bare.endswith("`" * _FENCE):
        return bare[:-_FENCE].removesuffix("\n"), True
    return code.removesuffix("\n"), False


def _close_outside_strings(code: str) -> int | None:
    """Where the first ``</code>`` stands that belongs to no string and no comment. One pass, whatever the code."""
    pieces = _PIECES.finditer(code)
    piece = next(pieces, None)
    for close in re.finditer(CODE_CLOSE, code):
        while piece is not None and piece.end() <= close.start():
            piece = next(pieces, None)
        if piece is None or piece.start() > close.start():
            return close.start()
    return None


def is_open(text: str) -> bool:
    """Whether ``text`` ends within a fenced block, so that a ``</code>`` at its end belongs to the program."""
    position = 0
    while fenced := _FENCED.search(text, position):
        program = _read_fenced(text, fenced)
        if program is None:
            return True
        position = program.end
    return False


def find_calls(text: str) -> list[ToolCall]:
    """The programs in one turn's text, in order; a malformed one says in ``error`` what is wrong, in words for the
    model. A program that can be read is run, whatever its fences look like."""
    calls: list[ToolCall] = []
    position = 0
    while (program := find_program(text, position)) is not None:
        raw = text[program.start + len(CODE_OPEN) : program.end - len(CODE_CLOSE)]
        calls.append(_call(program.code, raw))
        position = program.end
    rest = text[position:]
    opened, closed = rest.find(CODE_OPEN), rest.find(CODE_CLOSE)
    if opened >= 0:
        calls.append(ToolCall(None, f"the code has no closing {CODE_CLOSE}", rest[opened + len(CODE_OPEN) :]))
    elif closed >= 0:
        calls.append(ToolCall(None, f"{CODE_CLOSE} without {CODE_OPEN} before it", rest[:closed]))
    return calls


def _call(code: str, raw: str) -> ToolCall:
    if not code.strip():
        return ToolCall(None, "the code is empty", raw)
    if not is_text(code):
        return ToolCall(None, "the code holds half of a surrogate pair, which is no text", raw)
    return ToolCall(code, None, raw)


def split_turns(text: str) -> list[tuple[str, str | None]]:
    """A text in which programs and their outputs may stand, as a model and its environment would have written it: each
    turn up to ``</code>`` with the output that follows, and what is left with None.

    Raises:
        TagError: a program has no output.
    """
    turns: list[tuple[str, str | None]] = []
    position = 0
    while (program := find_program(text, position)) is not None:
        opened = _OUTPUT.match(text, program.end)
        if opened is None:
            raise TagError("code without output", program.start)
        output, end = _strict(text, opened, OUTPUT_CLOSE)
        turns.append((text[position : program.end], output))
        position = _BREAKS.match(text, end).end()  # type: ignore[union-attr]
    return [*turns, (text[position:], None)]


class Kind(StrEnum):
    """What a block of a tagged text is."""

    PROSE = "prose"
    CODE = "code"
    OUTPUT = "output"
    ANSWER = "answer"


class Block(NamedTuple):
    kind: Kind
    text: str
    """What stands between the tags: a program without its fences, an output or an answer without the line breaks beside
    the tags; prose as it stands."""
    raw: str
    """The very characters, tags included. Those of all blocks, one after the other, are the text."""


class TagError(ValueError):
    """A text that breaks the grammar of the tags. ``reason`` is one of a few phrases that can be counted."""

    def __init__(self, reason: str, position: int):
        super().__init__(f"{reason} (character {position})")
        self.reason, self.position = reason, position


def split(text: str) -> list[Block]:
    """A whole answer's blocks: prose, programs each followed by their output, and as the last block one answer.

    Raises:
        TagError: the text is anything else: a tag is not closed or not opened, a program has no output or an output no
            program, two programs stand in a row, an answer is missing, empty, or not the last block.
    """
    blocks = list(_blocks(text))
    waiting = answered = False
    position = 0
    for block in blocks:
        # A word after the answer does no harm; one between a program and its output does.
        if block.kind is Kind.PROSE and (answered or not block.text.strip()):
            position += len(block.raw)
            continue
        if answered:
            raise TagError("a block after the answer", position)
        if block.kind is Kind.OUTPUT and not waiting:
            raise TagError("output before code", position)
        if waiting and block.kind is Kind.CODE:
            raise TagError("two code blocks in a row", position)
        if waiting and block.kind is not Kind.OUTPUT:
            raise TagError("code without output", position)
        waiting, answered = block.kind is Kind.CODE, block.kind is Kind.ANSWER
        position += len(block.raw)
    if waiting:
        raise TagError("code without output", len(text))
    if not answered:
        raise TagError("no answer", len(text))
    return blocks


def _blocks(text: str) -> Iterator[Block]:
    position = 0
    while (tag := _TAG.search(text, position)) is not None:
        if tag.start() > position:
            yield Block(Kind.PROSE, text[position : tag.start()], text[position : tag.start()])
        if tag.group() == CODE_OPEN:
            kind, content, end = Kind.CODE, *_strict_program(text, tag.start())
        elif tag.group() == OUTPUT_OPEN:
            kind, content, end = Kind.OUTPUT, *_strict(text, tag, OUTPUT_CLOSE)
        elif tag.group() == ANSWER_OPEN:
            kind, content, end = Kind.ANSWER, *_strict(text, tag, ANSWER_CLOSE)
            if not content.strip():
                raise TagError("empty answer", tag.start())
        else:
            raise TagError(f"{tag.group()} without an opening tag", tag.start())
        yield Block(kind, content, text[tag.start() : end])
        position = end
    if position < len(text):
        yield Block(Kind.PROSE, text[position:], text[position:])


def _strict_program(text: str, start: int) -> tuple[str, int]:
    if not _FENCED.match(text, start):
        reason = "code without a fence (```python)" if CODE_CLOSE in text[start:] else f"unclosed {CODE_OPEN}"
        raise TagError(reason, start)
    program = find_program(text, start)
    if program is None:
        raise TagError(f"unclosed {CODE_OPEN}", start)
    if program.fault:
        raise TagError(program.fault, start)
    if not program.code.strip():
        raise TagError("empty code", start)
    return program.code, program.end


def _strict(text: str, opened: re.Match[str], close: str) -> tuple[str, int]:
    """What stands up to ``close``, less one line break at each side, and where that ends."""
    end = text.find(close, opened.end())
    if end < 0:
        raise TagError(f"unclosed {opened.group().strip()}", opened.start())
    content = text[opened.end() : end]
    # A program may print what looks like another tag; the tag's own opening inside means that its end is missing.
    if opened.group().strip() in content:
        raise TagError(f"unclosed {opened.group().strip()}", opened.start())
    return content.removeprefix("\n").removesuffix("\n"), end + len(close)
