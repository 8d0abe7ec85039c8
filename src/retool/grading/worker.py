"""The process in which math-verify runs: reads pairs of answers, one JSON list a line, and writes one verdict a line.

Started by ``verifier.py`` as a file of its own, so that nothing of ours but this is imported. It may hang, eat its
memory or crash: that is what it is for. It ends when its standard input does, or when its parent dies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from typing import Any

MEMORY_BYTES = 2 << 30
FLOAT_DIGITS = 12
"""Decimals that two floats must share; math-verify's own 6 make 3.1415926 equal π."""
READY, YES, NO = "ready", "1", "0"


def confine() -> None:
    """A limit on memory; death with the parent, where the system can do that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        import ctypes
        import signal

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def load() -> Any:
    import math_verify  # type: ignore[import-untyped]

    # It warns that its own time limit (a signal handler) is off; ours is the parent's.
    logging.disable(logging.CRITICAL)
    return math_verify


def parse(library: Any, text: str) -> list[Any]:
    parsed: list[Any] = library.parse(
        f"${text}$",
        extraction_config=[library.LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed


def same(library: Any, prediction: str, truth: str, plain: bool) -> bool:
    """Whether math-verify takes the two for the same.

    Args:
        plain: exactly one of them is a plain number, so that the other must be rational: no decimal is √2.
    """
    try:
        gold, found = parse(library, truth), parse(library, prediction)
        if not gold or not found:
            return False
        if plain and any(getattr(side[0], "is_rational", None) is False for side in (gold, found)):
            return False
        return bool(library.verify(gold, found, float_rounding=FLOAT_DIGITS, timeout_seconds=None))
    except Exception:  # sympy raises everything from TypeError to RecursionError for what it cannot read
        return False


def main() -> None:
    confine()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be taken for a verdict
    library = load()
    same(library, r"\frac{1}{2}", r"\sqrt{x}", False)  # its first parse builds tables for half a second
    answers.write(READY + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write((YES if same(library, *json.loads(line)) else NO) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
