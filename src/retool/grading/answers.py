"""Finding the final answer in a text."""

from __future__ import annotations

import re

TAIL = 10_000
"""Characters of a text in whose end an answer without a box is looked for."""
_SAID = re.compile(r"\banswer\s*(?:is|are|:)\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
# What models and few-shot prompts write behind the answer.
_CHATTER = re.compile(r"I hope it is correct\.?|<\|[a-z_]+\|>.*", re.DOTALL)
MAX_GLUE = 60
"""Characters between two boxes of one list."""
_LIST_GLUE = re.compile(r"[\s$,;]*(?:\\(?:quad|qquad|,|;| |text\s*\{\s*(?:and|or)\s*\})|and|or|[\s$,;])*")
_VALUE = re.compile(r"\$\$?([^$]+)\$\$?|\\[(\[](.+?)\\[)\]]|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# A backslash takes the next character with it, so that \{ and \} group nothing.
_MARKS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` with balanced braces holds, stripped; None where there is none or it is empty.

    Of nested boxes the inner one counts. One pass, whatever the text.
    """
    boxes = _boxes(text)
    return boxes[-1][2] if boxes and boxes[-1][2] else None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Where each box's content begins, where its box ends, and what it holds, in the order of their beginnings."""
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    found = []
    for mark in _MARKS.finditer(text):
        token = mark.group()
        if token.endswith("{") and token != "\\{":
            open_braces.append(mark.end() if token.startswith("\\boxed") else None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found.append((start, mark.end(), text[start : mark.start()].strip()))
    return sorted(found)


def find_answer(text: str) -> str | None:
    r"""The answer in a text that need not hold a box: the last ``\boxed{}`` (several in one breath, ``\boxed{1}`` and
    ``\boxed{2}``, are one list); else the last ``<answer>``; else what follows the last "answer is" or "Answer:"; else
    the last mathematics between dollars, or the last number."""
    boxed = last_boxes(text)
    if boxed:
        return boxed
    text = text[-TAIL:]
    before, closed, _ = text.rpartition("</answer>")
    tagged = before.rpartition("<answer>")[2].strip() if closed and "<answer>" in before else ""
    if tagged:
        return tagged
    text = _CHATTER.sub("", text)
    said = list(_SAID.finditer(text))
    statement = said[-1].group("answer").strip() if said else ""
    if statement:
        return _value_of(statement)
    return _last_value(text)


def last_boxes(text: str) -> str | None:
    """What the last box holds, and those that stand before it with nothing but an "and" or a comma between."""
    boxes = [box for box in _boxes(text) if box[2]]
    if not boxes:
        return None
    taken = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : taken[-1][0]].removesuffix("{").rstrip().removesuffix("\\boxed")
        if box[1] > taken[-1][0] or len(between) > MAX_GLUE or not _LIST_GLUE.fullmatch(between):
            break
        taken.append(box)
    return ", ".join(content for _, _, content in reversed(taken))


def _value_of(statement: str) -> str:
    """What a statement says something is: all of it where it is mathematics, what follows its last "is" in prose."""
    statement = re.sub(r"\s*\.(?:\s.*)?$", "", statement, flags=re.DOTALL).strip("* ")
    told = re.split(r"\b(?:is|are|equals)\b", statement)
    return told[-1].strip(" :") if len(told) > 1 and told[-1].strip() else statement


def _last_value(text: str) -> str | None:
    values = [(match.end(), match.group(1) or match.group(2) or match.group(0)) for match in _VALUE.finditer(text)]
    return max(values)[1].strip() if values else None
