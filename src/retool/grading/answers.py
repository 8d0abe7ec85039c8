"""Finding the final answer in a text."""

from __future__ import annotations

import re

# A backslash takes the next character with it, so that \{ and \} group nothing.
_MARKS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` with balanced braces holds, stripped; None where there is none or it is empty.

    Of nested boxes the inner one counts. One pass, whatever the text.
    """
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    found_start, found = -1, ""
    for mark in _MARKS.finditer(text):
        token = mark.group()
        if token.endswith("{") and token != "\\{":
            open_braces.append(mark.end() if token.startswith("\\boxed") else None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > found_start:
                found_start, found = start, text[start : mark.start()]
    return found.strip() or None
