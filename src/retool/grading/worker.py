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
MAX_DIGITS = 400
"""Digits that are followed until two values are called equal."""
POINTS = ((97, 13), (3, 7), (19, 11), (41, 9), (1, 23))
"""Values of symbols at which expressions are compared."""
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
        if not library.verify(gold, found, float_rounding=FLOAT_DIGITS, timeout_seconds=None):
            return False
        return not _differ(gold[0], found[0])
    except Exception:  # sympy raises everything from TypeError to RecursionError for what it cannot read
        return False


def _differ(one: Any, other: Any) -> bool:
    """Whether two things that math-verify takes for the same are certainly not: it rounds, and to it 10^{-30} is
    10^{-31}. Expressions are compared at rational points with as many digits as it takes; the members of sets and
    tuples among each other; of anything else nothing is known."""
    import sympy  # type: ignore[import-untyped]

    if one == other:
        return False
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        return _values_differ(one, other)
    if isinstance(one, sympy.Tuple) and isinstance(other, sympy.Tuple) and len(one) == len(other):
        return any(map(_differ, one, other))
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return any(all(_differ(a, b) for b in other) for a in one)
    return False


def _values_differ(one: Any, other: Any) -> bool:
    import sympy

    difference = one - other
    # A decimal is what it shows, not the nearest binary fraction.
    difference = difference.replace(lambda e: e.is_Float, lambda e: sympy.Rational(str(e)))
    if difference.is_Rational:
        return bool(difference != 0)
    symbols = sorted(difference.free_symbols, key=str)
    for first in range(2):
        point = {s: sympy.Rational(*POINTS[(first + place) % len(POINTS)]) for place, s in enumerate(symbols)}
        value = difference.subs(point)
        if not value.is_number or value.has(sympy.oo, sympy.nan, sympy.zoo):
            continue
        parts = value.evalf(15, maxn=MAX_DIGITS).as_real_imag()
        # evalf gives a zero whose digits it could not find a precision of 1.
        if any(part.is_Float and part._prec > 10 for part in parts):
            return True
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
