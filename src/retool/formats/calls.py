"""The one tool, and how its calls are found in a turn's text (the Hermes convention: JSON between two tags)."""

from __future__ import annotations

import json
from typing import Any

from retool.types import ToolCall

TOOL_NAME = "code_interpreter"

# Every token of this stands in every prompt: keep it short.
TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Run Python code and see what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
_SHAPE = f'{{"name": "{TOOL_NAME}", "arguments": {{"code": "..."}}}}'
_JSON = json.JSONDecoder()
# json raises RecursionError for deep nesting and a plain ValueError for integers of over 4300 digits.
_JSON_ERRORS = (ValueError, RecursionError)


def is_text(text: str) -> bool:
    """Whether a file can hold the text: JSON can spell half of a surrogate pair (``\\ud800``), which none can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tool_call(code: str) -> dict[str, Any]:
    """A call of the tool, as chat templates take it."""
    return {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": code}}}


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        hint = "; write a line break inside a string as \\n" if error.msg.startswith("Invalid control") else ""
        return f"{error.msg} (character {error.pos}){hint}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _check(payload: object) -> tuple[str | None, str | None]:
    """``(code, error)`` of a parsed call: exactly one of them is None."""
    if not isinstance(payload, dict):
        return None, f"a call must be a JSON object like {_SHAPE}"
    name = payload.get("name")
    if name != TOOL_NAME:
        return None, f"unknown function {str(name)[:40]!r}; the only function is {TOOL_NAME!r}"
    arguments = payload.get("arguments")
    if not isinstance(arguments, dict) or "code" not in arguments:
        return None, f'"code" is missing from "arguments"; write {_SHAPE}'
    code = arguments["code"]
    if not isinstance(code, str):
        return None, f'"code" must be a string, not {type(code).__name__}'
    if not is_text(code):
        return None, '"code" holds half of a surrogate pair, which is no text'
    return code, None


def parse_call(raw: str) -> ToolCall:
    """The call between two delimiters, or what is wrong with it."""
    try:
        payload = json.loads(raw)
    except _JSON_ERRORS as error:
        return ToolCall(None, f"the call is not valid JSON: {_describe(error)}", raw)
    code, problem = _check(payload)
    return ToolCall(code, problem, raw)


def _end_of_json(text: str, start: int) -> int | None:
    """Where the closing tag of the call that starts at ``start`` stands, if its JSON is whole; None otherwise. Code may
    spell a closing tag, so the first one in the text need not be the call's own."""
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        _, end = _JSON.raw_decode(text, start)
    except _JSON_ERRORS:
        return None
    while end < len(text) and text[end].isspace():
        end += 1
    return end if text.startswith(CALL_CLOSE, end) else None


def find_calls(text: str) -> list[ToolCall]:
    """The calls of one turn, in order; malformed ones say in ``error`` what is wrong, in words for the model."""
    calls: list[ToolCall] = []
    position = 0
    while (opened := text.find(CALL_OPEN, position)) >= 0:
        start = opened + len(CALL_OPEN)
        end = _end_of_json(text, start)
        if end is None:
            end = text.find(CALL_CLOSE, start)
        if end < 0:
            raw = text[start:]
            calls.append(ToolCall(None, f"the call has no closing {CALL_CLOSE}", raw))
            break
        calls.append(parse_call(text[start:end]))
        position = end + len(CALL_CLOSE)
    return calls
