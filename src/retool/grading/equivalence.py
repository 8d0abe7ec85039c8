"""Whether two answers mean the same number, set, expression or word.

Plain numbers are compared exactly and at once; everything else goes to math-verify, whose own time limit is a signal
handler and is therefore switched off: answers that could keep it busy are refused by their form instead. A bound on
its time that holds for every input would need a process of its own.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import cache
from typing import Any

MAX_CHARS = 300
"""Longer answers are compared as text alone: the parser's time grows faster than its input."""
MAX_NESTING = 8
"""Deeper brackets are compared as text alone, for the same reason."""
MAX_DIGITS_OF_POWER = 4
"""An exponent, or what a factorial or a binomial takes, may have this many digits: 9999! still takes milliseconds."""
MAX_POWER_OF_VARIABLES = 20
"""Where there are variables, a power is multiplied out; higher ones only where the truth holds the same number."""
FLOAT_DIGITS = 12
"""Decimals that a rounded answer must share with an exact one; math-verify's own 6 make 3.1415926 equal π."""

_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.([0-9]*))?")
_FRACTION = re.compile(r"([+-]?)\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/]+)/([^/]+)")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-]*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_DROPPED = re.compile(r"\\(?:[,!;: ]|left(?![a-z])|right(?![a-z])|displaystyle)|\^\{?\s*\\circ\s*\}?|°|\\?%|\\\$|\$")
_OPERATORS = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|approx|sim|simeq|cong)(?![a-z])|≈|!!|\)!|\}!")
_POWER = re.compile(r"(?:\^|\*\*)[\s{(+-]*([0-9]+)")
_SHORT_WORD = 3  # up to here letters without \text may be a product of variables, whose order is free


def clean(answer: str) -> str:
    """``answer`` without what does not change its value: white space around it, dollar signs, degree and percent
    signs, LaTeX's spaces and sizes, a full stop."""
    text = re.sub(r"\\[dt]frac", r"\\frac", answer.replace("−", "-"))
    text = re.sub(r"\{,\}|,\\!\s*", ",", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _DROPPED.sub("", text))
    return text.strip().removesuffix(".").strip()


def number(text: str) -> Fraction | None:
    """The exact value of a plain number: digits with or without thousands separators, sign, decimals, or a fraction of
    two such numbers; None for anything else."""
    text = text.strip()
    if len(text) > MAX_CHARS:
        return None
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, *parts = fraction.groups()
        above, below = (number(part) for part in parts if part is not None)
        if above is None or not below:
            return None
        return -above / below if sign == "-" else above / below
    match = _NUMBER.fullmatch(text)
    if not match or (match.group(2) is None and not match.group(3)):
        return None
    sign, whole, decimals = match.groups()
    value = Fraction(int((whole or "0").replace(",", "") + (decimals or "")), 10 ** len(decimals or ""))
    return -value if sign == "-" else value


def equivalent(prediction: str | None, truth: str) -> bool:
    """Whether ``prediction`` means what ``truth`` means. Nothing equals an empty answer. Never raises.

    An answer that only contains the truth (``72 or 73``) is not equal to it, but one that names what it is the value of
    is (``x = 72``), and so is one with a unit (``72\\text{ apples}``).
    """
    if prediction is None:
        return False
    ours, theirs = clean(prediction), clean(truth)
    if not ours or not theirs:
        return False
    our_number, their_number = number(ours), number(theirs)
    if our_number is not None and their_number is not None:
        return our_number == their_number
    if ours == theirs:
        return True
    our_words, their_words = _words(ours), _words(theirs)
    if _is_prose(ours) or _is_prose(theirs):
        return our_words is not None and our_words == their_words
    return _is_tame(ours, theirs) and _same_mathematics(ours, theirs)


def _words(text: str) -> str | None:
    """The words that ``text`` is made of, in lower case; None where there is anything else in it."""
    plain = _TEXT.sub(r"\1", text).strip()
    return " ".join(plain.lower().split()) if _WORDS.fullmatch(plain) else None


def _is_prose(text: str) -> bool:
    """Whether ``text`` is words, not variables. To a parser of mathematics ``listen`` and ``silent`` are the same
    product."""
    return _words(text) is not None and (len(text) > _SHORT_WORD or bool(_TEXT.search(text)))


def _is_tame(prediction: str, truth: str) -> bool:
    """Whether math-verify can be trusted to judge this pair soon, and not to read too much into it."""
    for text in (prediction, truth):
        if len(text) > MAX_CHARS or _nesting(text) > MAX_NESTING:
            return False
    # It reads "1 2" as 1 + 2, and takes the left side of "72 ≈ 73" for the answer.
    if re.search(r"[0-9]\s+[0-9]", prediction):
        return False
    if _OPERATORS.search(prediction) and not _OPERATORS.search(truth):
        return False
    powers = [int(digits) for digits in _POWER.findall(prediction)]
    if any(power >= 10**MAX_DIGITS_OF_POWER for power in powers):
        return False
    if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", prediction)):
        known = {int(digits) for digits in re.findall(r"[0-9]+", truth) if len(digits) <= MAX_DIGITS_OF_POWER}
        if any(power > MAX_POWER_OF_VARIABLES and power not in known for power in powers):
            return False
    # A power's exponent must not hold a power, nor a factorial or a binomial large numbers.
    if re.search(r"(?:\^|\*\*)\s*(?:\{[^{}]*|\([^()]*|[^\s{}()]{1,2})(?:\^|\*\*)", prediction):
        return False
    if "!" in prediction or "\\binom" in prediction:
        return not re.search(rf"[0-9]{{{MAX_DIGITS_OF_POWER + 1},}}", prediction)
    return True


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


@cache
def _math_verify() -> Any:
    import math_verify  # type: ignore[import-untyped]

    # It warns that its time limit is off; ours is the form of the answers.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    return math_verify


def _parse(text: str) -> list[Any]:
    library = _math_verify()
    parsed: list[Any] = library.parse(
        f"${text}$",
        extraction_config=[library.LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed


def _same_mathematics(prediction: str, truth: str) -> bool:
    try:
        gold, found = _parse(truth), _parse(prediction)
        if not gold or not found:
            return False
        return bool(_math_verify().verify(gold, found, float_rounding=FLOAT_DIGITS, timeout_seconds=None))
    except Exception:  # sympy raises everything from TypeError to RecursionError for what it cannot read
        return False
