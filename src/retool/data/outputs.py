"""Whether a program's real output is the one that was written down, and whether a difference matters."""

from __future__ import annotations

import re

TOLERANCE = 1e-6
"""Relative difference of two numbers that count as the same: what is left of a float printed with 6 digits."""
_PIECE = re.compile(r"(?P<number>(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w))|\w+|[^\w\s]")
_WORD = 3  # letters from which on a word says something
_TRACEBACK = "Traceback (most recent call last)"


def same_output(written: str, real: str) -> bool:
    """Whether two outputs say the same: piece by piece, white space aside; numbers to ``TOLERANCE``, or to the digits
    that the one with fewer shows. Of two tracebacks only the last lines are compared: the others name files."""
    if _TRACEBACK in written and _TRACEBACK in real:
        written, real = _last_line(written), _last_line(real)
    ours, theirs = _pieces(written), _pieces(real)
    return len(ours) == len(theirs) and all(map(_same_piece, ours, theirs))


def changes_reasoning(written: str, real: str, after: str) -> bool:
    """Whether the text ``after`` an output leans on something that was written down and is not in the real output:
    a number, or a word of three letters or more, which the text takes up."""
    told, said = _telling(written), _telling(after)
    taken_up = {piece for piece in told if any(_same_piece(piece, other) for other in said)}
    there = _telling(real)
    return any(not any(_same_piece(piece, other) for other in there) for piece in taken_up)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _pieces(text: str) -> list[str]:
    return [match.group() for match in _PIECE.finditer(text)]


def _telling(text: str) -> set[str]:
    return {piece for piece in _pieces(text) if _number(piece) is not None or (len(piece) >= _WORD and piece.isalpha())}


def _number(piece: str) -> float | None:
    try:
        return float(piece)
    except ValueError:
        return None


def _same_piece(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    a, b = _number(ours), _number(theirs)
    if a is None or b is None:
        return False
    if all(re.fullmatch(r"[-+]?\d+", piece) for piece in (ours, theirs)):  # compared as text: floats lose digits
        return _plain(ours) == _plain(theirs)
    if a == b:
        return True
    if abs(a - b) <= TOLERANCE * max(abs(a), abs(b)):
        return True
    shown = min(_decimals(ours), _decimals(theirs))
    return shown > 0 and "e" not in (ours + theirs).lower() and round(a, shown) == round(b, shown)


def _plain(piece: str) -> str:
    digits = piece.lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if piece.startswith("-") and digits != "0" else digits


def _decimals(piece: str) -> int:
    return len(piece.partition(".")[2])
