r"""Whether two answers mean the same number, set, expression or word.

Plain numbers and words are compared exactly and at once. Everything else goes to math-verify, in a process of its own
(``verifier.py``), once its form shows that the two can be the same at all: math-verify reads a lot into what it does
not understand (it takes ``2x + z = 1`` for ``1``, and drops what ``\text{}`` says).
"""

from __future__ import annotations

import re
from fractions import Fraction

from retool.grading.answers import last_boxes
from retool.grading.verifier import SHARED, Verifier

MAX_CHARS = 1000
"""Longer answers are compared as text alone."""
MAX_DIGITS_OF_POWER = 5
"""Longer exponents of plain numbers are refused at once: it would be a hang, and a hang costs seconds."""

_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)?(?:\.([0-9]*))?")
_SCIENTIFIC = re.compile(
    r"(?P<digits>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)) \s*"
    r"(?: [eE] | (?:\\times|\\cdot|\*|×|·) \s* 10 \s* (?:\^|\*\*) ) \s* \{? (?P<power>[+-]?[0-9]{1,3}) \}?",
    re.VERBOSE,
)
_MIXED = re.compile(r"([+-]?)([0-9]+)\s*(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|\s([0-9]+)/([0-9]+))")
_MIXED_FACTOR = re.compile(r"(?<![\w^_.\\}])([0-9]+)\s*\\frac\{([0-9]+)\}\{([0-9]+)\}")
_FRACTION = re.compile(r"([+-]?)\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/]+)/([^/]+)")
_REPEATING = re.compile(r"([+-]?)([0-9]+)\.([0-9]*)\\overline\{([0-9]+)\}")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]{1,2})\}?")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?[.):]?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-]*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WRAPPED = re.compile(r"\s*(?:\$\$?(.*?)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\])\s*\.?\s*", re.DOTALL)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9])")
# The two backslashes between a matrix's rows are no spaces.
_DROPPED = re.compile(
    r"(\\\\)\s*|\\(?:[,!;: ]|left(?![a-z])|right(?![a-z])|displaystyle|quad|qquad|[bB]igg?[lr]?(?![a-z]))"
    r"|\\?%|\\\$|\$|€|£|~"
)
_DEGREES = re.compile(r"\^\{?\s*\\circ\s*\}?|°")
_UNITS = re.compile(r"(?<=[0-9}])\s*(?:\\text\{\s*)?(?:percent|per cent|percentage|degrees?)(?:\s*\})?\s*$")
_TRIGONOMETRY = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]*\s*([0-9.]+)\s*(?:\^\{?\s*\\circ\s*\}?|°)\s*[)}]*")
_LOGARITHM = re.compile(r"\\log_\{?([0-9]+)\}?\s*\{?([0-9]+)\}?")
_POWER = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*-?([0-9]+)")
# Turns "72" into something else, or into a claim about it.
_OPERATORS = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|approx|sim|simeq|cong)(?![a-z])|≈|~|!!|\)!|\}!|\?")
_RELATION = re.compile(r"<|>|\\(?:le|ge|lt|gt|leq|geq|neq|ne|in)(?![a-z])|≤|≥|≠|!=")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([^()]*\))?(?::[A-Z])?|\([A-Za-z](?:,\s*[A-Za-z])*\)|\\angle\s*[A-Z]+"
)
_SAYS_MORE = re.compile(
    r"[0-9]|\b(?:or|and|not|if|maybe|perhaps|except|about|nearly|otherwise|where|when)\b", re.IGNORECASE
)
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\emptyset"), r"\\varnothing"),
    (re.compile(r"\\mathbb\s+([A-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\(?:cdotp|ast)(?![a-z])"), r"\\cdot "),
    (re.compile(r"\{,\}|,\s*\\!\s*"), ","),
    (re.compile(r"\\(?:lvert|rvert)"), "|"),
    (re.compile(r"\+\s*\\infty"), r"\\infty"),
)


def clean(answer: str) -> str:
    """``answer`` without what does not change its value: white space around it, the marks of mathematics, a box,
    currency, percent and degree signs, LaTeX's spaces and sizes, a full stop."""
    text = answer.replace("−", "-").replace("\u2013", "-").replace("π", r"\pi ").replace("∞", r"\infty ")
    if "\\boxed" in text:
        text = last_boxes(text) or ""
    while (wrapped := _WRAPPED.fullmatch(text)) and "$" not in (
        inner := next(g for g in wrapped.groups() if g is not None)
    ):
        text = inner
    for pattern, plain in _SYNONYMS:
        text = pattern.sub(plain, text)
    space = " " if "\\quad" in text else ""
    text = _TRIGONOMETRY.sub(r"\1(\\frac{\2\\pi}{180})", text)
    text = _DEGREES.sub("", _DROPPED.sub(lambda m: m[1] or space, text))
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{_braced(m[1])}{_braced(m[2])}", text)
    text = _LOGARITHM.sub(r"\\log_{\1}{\2}", text).strip()
    return _UNITS.sub("", text).removesuffix(".").strip()


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"


def number(text: str) -> Fraction | None:
    """The exact value of a plain number: digits with or without thousands separators, sign, decimals, a power of ten, a
    base (``204_5``), repeating decimals, a mixed number, or a fraction of two plain numbers; None for anything else."""
    text = text.strip()
    if len(text) > MAX_CHARS:
        return None
    if (mixed := _MIXED.fullmatch(text)) is not None:
        sign, whole, *parts = mixed.groups()
        above, below = (int(part) for part in parts if part is not None)
        value = int(whole) + Fraction(above, below) if below else None
        return -value if sign == "-" and value is not None else value
    if (fraction := _FRACTION.fullmatch(text)) is not None:
        sign, *parts = fraction.groups()
        upper, lower = (number(part) for part in parts if part is not None)
        if upper is None or not lower:
            return None
        return -upper / lower if sign == "-" else upper / lower
    if (scientific := _SCIENTIFIC.fullmatch(text)) is not None:
        return Fraction(scientific["digits"]) * Fraction(10) ** int(scientific["power"])
    if (based := _IN_BASE.fullmatch(text)) is not None and based[1][0].isdigit() and based[2].lstrip("0"):
        try:
            return Fraction(int(based[1], int(based[2])))
        except ValueError:  # a digit that the base does not have, or no base
            return None
    if (repeating := _REPEATING.fullmatch(text)) is not None:
        sign, whole, start, period = repeating.groups()
        difference = int(whole + start + period) - int(whole + start)
        value = Fraction(difference, (10 ** len(period) - 1) * 10 ** len(start))
        return -value if sign == "-" else value
    match = _NUMBER.fullmatch(text)
    if not match or (match.group(2) is None and not match.group(3)):
        return None
    sign, whole, decimals = match.groups()
    digits = (whole or "0").replace(",", "").replace(" ", "") + (decimals or "")
    value = Fraction(int(digits), 10 ** len(decimals or ""))
    return -value if sign == "-" else value


def equivalent(prediction: str | None, truth: str, *, verifier: Verifier = SHARED) -> bool:
    r"""Whether ``prediction`` means what ``truth`` means, whatever they hold. Nothing equals an empty answer.

    An answer that only contains the truth (``72 or 73``) is not equal to it, but one that names what it is the value of
    is (``x = 72``), and so is one with a unit (``72\text{ apples}``). A decimal equals a fraction where it is exactly
    that, and never an irrational number.

    Raises:
        InfraError: math-verify's process does not start on this machine.
    """
    if prediction is None:
        return False
    if max(len(prediction), len(truth)) > 4 * MAX_CHARS:  # even tidying them would take its time
        return bool(prediction.strip()) and prediction.strip() == truth.strip()
    ours, theirs = clean(prediction), clean(truth)
    if not ours or not theirs:
        return False
    our_number, their_number = number(ours), number(theirs)
    if our_number is not None and their_number is not None:
        return our_number == their_number
    if _tight(ours) == _tight(theirs):
        return True
    our_choice, their_choice = _CHOICE.fullmatch(_bare(ours)), _CHOICE.fullmatch(_bare(theirs))
    if our_choice and their_choice and (len(_bare(ours)) > 1 or len(_bare(theirs)) > 1):
        return our_choice[1] == their_choice[1]
    our_words, their_words = _words(ours), _words(theirs)
    if our_words is not None and our_words == their_words and re.search(r"[a-z]{3}", our_words):
        return True
    if _is_prose(ours) or _is_prose(theirs):
        return our_words is not None and our_words == their_words
    if not _can_be_same(ours, theirs):
        return False
    ours, theirs = _as_product(ours), _as_product(theirs)
    plain = (our_number is None) != (their_number is None)
    pairs = [(ours, theirs)]
    if _RELATION.search(ours) and re.match(r"[\[(\\]", theirs):
        pairs.append((theirs, ours))  # math-verify reads an inequality as an interval on one side alone
    return any(verifier.same(first, second, plain=plain) for first, second in pairs)


def _tight(text: str) -> str:
    """Without white space beside signs and brackets; between two digits or two words it stays."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text)


def _bare(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip()


def _words(text: str) -> str | None:
    """The words that ``text`` is made of, in lower case; None where there is anything else in it."""
    plain = _bare(text)
    return " ".join(plain.lower().split()) if _WORDS.fullmatch(plain) else None


def _is_prose(text: str) -> bool:
    """Whether ``text`` is words, not variables. To a parser of mathematics ``listen`` and ``silent`` are the same
    product."""
    return _words(text) is not None and (re.search(r"[A-Za-z]{4}", text) is not None or bool(_TEXT.search(text)))


def _can_be_same(ours: str, theirs: str) -> bool:
    """Whether the form of the two lets them mean the same, and math-verify can be trusted to see what they mean."""
    if max(len(ours), len(theirs)) > MAX_CHARS:
        return False
    if not _same_letters(ours, theirs):
        return False
    for first, second in ((ours, theirs), (theirs, ours)):
        # It reads "1 2" as 1 + 2, and takes the left side of "72 ≈ 73" for the answer.
        if re.search(r"[0-9]\s+[0-9]", first) and "\\begin" not in first:
            return False
        if _OPERATORS.search(first) and not _OPERATORS.search(second):
            return False
        if not _says_only(first, second) or not _names_only(first, second):
            return False
        if bool(_IN_BASE.fullmatch(first)) != bool(_IN_BASE.fullmatch(second)):
            return False  # it drops the base
        if any(len(digits) > MAX_DIGITS_OF_POWER for digits in _POWER.findall(first)):
            return False
        # A power of a power, a factorial of a factorial: no answer, but hours.
        if re.search(r"(?:\^|\*\*)\s*(?:\{[^{}]*|\([^()]*|[^\s{}()]{1,2})(?:\^|\*\*)", first):
            return False
    return True


def _as_product(text: str) -> str:
    """With the products written out that math-verify's parser reads as sums: ``2(3)``, ``(2)(3)``, ``3\\frac12 x``."""
    text = _MIXED_FACTOR.sub(r"(\1+\\frac{\2}{\3})", text)
    return re.sub(r"\)\s*(?=\()", r")\\cdot ", re.sub(r"(?<![\w^_.\\}])([0-9]+)\s*(?=\()", r"\1\\cdot ", text))


def _same_letters(ours: str, theirs: str) -> bool:
    """Whether the two write their letters alike, and mark as many: to math-verify ``X`` is ``x``, and f' is f."""
    marks = [len(re.findall(r"'|\\prime", text)) for text in (ours, theirs)]
    letters = [set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", _TEXT.sub("", text)))) for text in (ours, theirs)]
    folded = [{letter.lower() for letter in found} for found in letters]
    return marks[0] == marks[1] and (letters[0] == letters[1] or folded[0] != folded[1])


def _says_only(text: str, other: str) -> bool:
    """Whether the words beside the mathematics are units, or a list's "and" and "or"."""
    for words in _TEXT.findall(text):
        said = words.strip().lower()
        if _SAYS_MORE.search(said) and said not in ("and", "or", ", and", "and "):
            return said in other.lower()
    return True


def _names_only(text: str, other: str) -> bool:
    """Whether an equation says no more than what something is called, where the other answer is none."""
    if "=" not in re.sub(r"[!<>]=", "", text) or "=" in other:
        return True
    if _RELATION.search(other):
        return False
    for part in re.split(r"[,;]|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b", re.sub(r"\([^()]*,[^()]*\)", "()", text)):
        name, equals, value = part.partition("=")
        if equals and ("=" in value or not (_NAME.fullmatch(name.strip()) or name.strip() == "()")):
            return False
    return True
