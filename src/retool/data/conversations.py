"""Conversations in files: Parquet with one row a conversation, read back to what was written.

Columns: ``id``; ``messages`` (list of ``role``, ``content``, ``tool_calls``, in the layout of chat templates);
``tools`` (whether the prompt shows the tool); ``source`` and ``answer``, for people and for checks. A file of other
making needs ``messages`` alone, in Parquet or JSON Lines.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from retool.data.prepare import write_whole
from retool.data.reading import rows as read_rows
from retool.data.retool_sft import to_messages
from retool.errors import DataError
from retool.formats import tags
from retool.formats.calls import tool_call
from retool.formats.chat import ChatFormat
from retool.grading.answers import extract_answer
from retool.types import Conversation, Message

_CALL = pa.struct(
    [
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.struct([("code", pa.string())]))])),
    ]
)
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(_CALL))])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("answer", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.bool_()),
    ]
)
_NAMES_THE_ANSWER = re.compile(r"(?:The (?:final )?answer is:? )?\$?\\boxed\{.*\}\$?\.?")
_ROLES = ("system", "user", "assistant", "tool")


class Row(NamedTuple):
    """A conversation and what is known of where it comes from."""

    conversation: Conversation
    source: str = ""
    answer: str = ""


def write_conversations(path: Path, rows: Iterable[Row]) -> None:
    """Write the file whole, or not at all.

    Raises:
        DataError: it cannot be written.
    """
    table = pa.Table.from_pylist(
        [
            {
                "id": row.conversation.id,
                "source": row.source,
                "answer": row.answer,
                "messages": row.conversation.messages,
                "tools": row.conversation.tools,
            }
            for row in rows
        ],
        schema=SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue())


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a Parquet or JSON Lines file, one after the other.

    Raises:
        DataError: the file cannot be read, or a row holds no chat that can be learnt; names the file and the row.
    """
    for number, row in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        messages = _messages(row, where)
        tools = row.get("tools")
        # verl's column of that name holds the tools' schemas.
        yield Conversation(str(row.get("id") or number), messages, tools if isinstance(tools, bool) else True)


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    found = row.get("messages")
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: no 'messages'; give a list of chat messages, the last one the assistant's")
    messages = [_message(message, where) for message in found]
    if messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
        raise DataError(f"{where}: the chat must begin with a system or user message and end with the assistant's")
    return messages


def _message(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in _ROLES:
        raise DataError(f"{where}: a message has the role {role!r}; use one of {', '.join(_ROLES)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: the content of a {role} message is no string; give text")
    found: Message = {"role": role, "content": content or ""}
    calls = message.get("tool_calls")
    if calls:
        found["tool_calls"] = [_call(call, where) for call in calls]
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return tool_call(str(arguments["code"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{where}: a tool call without the argument 'code'; give function.arguments.code") from None


def with_answer_tags(conversation: Conversation) -> Conversation:
    r"""The conversation as the ``code_tags`` format wants its end: the last turn's ``\boxed{}`` inside ``<answer>``,
    instead of a last line that does nothing but name it. One without the tool or without a box stays as it is."""
    *others, last = conversation.messages
    text = str(last["content"])
    answer = extract_answer(text)
    if not conversation.tools or answer is None or tags.ANSWER_OPEN in text:
        return conversation
    before, _, line = text.rpartition("\n")
    said = before if _NAMES_THE_ANSWER.fullmatch(line) else text
    content = tags.join(said, tags.write_answer(f"\\boxed{{{answer}}}"))
    return replace(conversation, messages=[*others, {**last, "content": content}])


def with_calls(conversation: Conversation) -> Conversation:
    """The conversation with tool calls and tool messages where its last turn is one string with the paper's tags: as it
    stands, a format with calls would learn to write what the environment writes.

    Raises:
        DataError: that string breaks the grammar of the tags.
    """
    *others, last = conversation.messages
    text = str(last["content"])
    if tags.CODE_OPEN not in text or tags.OUTPUT_OPEN not in text or last.get("tool_calls"):
        return conversation
    try:
        blocks = tags.split(text)
    except tags.TagError as error:
        raise DataError(f"conversation {conversation.id!r}: {error}; mend its tags, or leave the row out") from None
    return replace(conversation, messages=[*others, *to_messages(blocks)])


class Encoded(NamedTuple):
    """A conversation as tokens; the mask is 1 on the assistant's."""

    conversation: Conversation
    ids_T: list[int]
    mask_T: list[int]


def encode(conversations: Iterable[Conversation], fmt: ChatFormat, max_tokens: int) -> tuple[list[Encoded], int]:
    """Conversations as what a rollout of the same turns would be, and how many were left out because they are longer.

    Raises:
        DataError: a conversation cannot be written in the format; names it.
    """
    found, too_long = list[Encoded](), 0
    for conversation in conversations:
        try:
            ids, mask = fmt.conversation_ids(conversation.messages, tools=conversation.tools)
        except DataError as error:
            raise DataError(f"conversation {conversation.id!r}: {error}") from None
        if len(ids) <= max_tokens:
            found.append(Encoded(conversation, ids, mask))
        else:
            too_long += 1
    return found, too_long
