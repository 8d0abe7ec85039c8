r"""ReTool-SFT's rows, and any others written with the paper's tags, as conversations with tool calls.

A row as it was published: ``messages[0]`` is the user's, the paper's prompt around the question, which stands behind
``*user question:*``; ``messages[1]`` is the assistant's, one string in which prose, programs (``<code>``), what they
printed (``<interpreter>``) and at last the answer (``<answer>\boxed{…}</answer>``) stand in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from retool.data.prompts import prompt_messages
from retool.formats import tags
from retool.formats.calls import is_text, tool_call
from retool.formats.tags import Block, Kind
from retool.grading.answers import extract_answer
from retool.types import Message

_MARKER = re.compile(r"\*+\s*user question\s*:\s*\*+", re.IGNORECASE)
_LEAD = re.compile(r"\s*Answer the following Math Problem and put the answer in the format of \\boxed\{+answer\}+\s*")
_END = "Remember to place the final answer in the last part using the format:"
_TAIL = re.compile(r"\s*" + _END.replace(" ", r"\s+"))  # carriers of the rows wrap lines


class RowError(ValueError):
    """A row that gives no sound conversation; its text is one of a few reasons that can be counted."""


class Converted(NamedTuple):
    """A row, taken apart."""

    question: str
    answer: str
    """What the answer's box holds."""
    blocks: list[Block]

    @property
    def response(self) -> str:
        """The assistant's string, to the character."""
        return "".join(block.raw for block in self.blocks)

    def messages(self, form: str = "messages") -> list[Message]:
        """The conversation: with tool calls and tool messages, or (``form="tags"``) with the assistant's own string."""
        if form == "tags":
            return [*prompt_messages(self.question), {"role": "assistant", "content": self.response}]
        return [*prompt_messages(self.question), *to_messages(self.blocks)]


def convert(row: Any) -> Converted:
    """A row in the published form.

    Raises:
        RowError: the row is not in that form, or its response breaks the grammar of the tags (``formats.tags.split``).
    """
    prompt, response = _contents(row)
    question = extract_question(prompt)
    try:
        blocks = tags.split(response)
    except tags.TagError as error:
        raise RowError(error.reason) from None
    (answer,) = (block.text for block in blocks if block.kind is Kind.ANSWER)
    boxed = extract_answer(answer)
    if boxed is None:
        raise RowError(r"answer without \boxed{}")
    return Converted(question, boxed, blocks)


def _contents(row: Any) -> tuple[str, str]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("no 'messages'")
    if not all(isinstance(message, Mapping) for message in messages):
        raise RowError("a message that is no object")
    if [message.get("role") for message in messages] != ["user", "assistant"]:
        raise RowError("not one user message and one assistant message")
    prompt, response = (message.get("content") for message in messages)
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise RowError("a message whose content is no text")
    if not (is_text(prompt) and is_text(response)):
        raise RowError("half of a surrogate pair")
    if not response.strip():
        raise RowError("empty response")
    return prompt, response


def extract_question(prompt: str) -> str:
    """The question in a filled prompt, without the paper's words around it.

    Raises:
        RowError: there is no question in it.
    """
    marker = _MARKER.search(prompt)
    if marker is None:
        raise RowError("no '*user question:*' in the prompt")
    question = prompt[marker.end() :]
    ends = list(_TAIL.finditer(question))
    question = question[: ends[-1].start()] if ends else question
    question = _LEAD.sub("", question, count=1).strip()
    if not question:
        raise RowError("empty question")
    return question


def to_messages(blocks: Sequence[Block]) -> list[Message]:
    """The assistant's turns and the tool's answers: each program becomes a call beside the prose before it, its output
    a tool message, the rest the last turn. Prose is stripped; programs, outputs and the answer stay as they are."""
    messages: list[Message] = []
    prose = ""
    for block in blocks:
        if block.kind is Kind.CODE:
            messages.append({"role": "assistant", "content": prose.strip(), "tool_calls": [tool_call(block.text)]})
            prose = ""
        elif block.kind is Kind.OUTPUT:
            messages.append({"role": "tool", "content": block.text})
        else:
            prose += block.raw
    return [*messages, {"role": "assistant", "content": prose.strip()}]


def to_text(messages: Sequence[Message]) -> str:
    """The assistant's turns and the tool's answers as one string with tags: what ``to_messages`` came from, with one
    empty line between a block and what stands beside it."""
    return tags.join(*_parts(messages))


def _parts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message["role"] == "tool":
            yield tags.write_output(str(message["content"]))
            continue
        yield str(message["content"])
        for call in message.get("tool_calls", ()):
            yield tags.write_code(call["function"]["arguments"]["code"])
