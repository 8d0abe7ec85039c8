"""What a training set is cleaned of: wrappers around its questions, duplicates, problems with two answers."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# DAPO-Math-17k's published prompts wrap each problem in these words.
_WRAPPER = re.compile(
    r"""\s*Solve \s the \s following \s math \s problem \s step \s by \s step\. .*?
    where \s \$Answer \s is \s the \s answer \s to \s the \s problem\. \s*
    (?P<problem>.*?)
    (?:\s* Remember \s to \s put \s your \s answer \s on \s its \s own \s line \s after \s ["“]Answer:["”]\.?)? \s*""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# Dollars, \( \), \[ \] delimit mathematics, thin spaces and sizes only set it; none says what the problem is.
_SETTING = re.compile(r"""(?<!\\)\\[()\[\],!] | \\(?:left|right|displaystyle)(?![A-Za-z]) | [$]""", re.VERBOSE)
_WIDE = re.compile(r"""(?<!\\)\\[;:\ ] | \\q?quad(?![A-Za-z]) | ~""", re.VERBOSE)
# NFKC would make 25 of 2⁵.
_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
_LOWERED = re.compile(r"[₀-₉₊₋]+")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_ONE_IN_BRACES = re.compile(r"\{([0-9A-Za-z])\}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
"""A space, but for one that parts two numbers."""


def strip_wrapper(question: str) -> str:
    """The question without white space around it, and without DAPO's words about how to answer."""
    match = _WRAPPER.fullmatch(question)
    return (match.group("problem") if match else question).strip()


def is_chinese(text: str) -> bool:
    """Whether the text holds a Han character."""
    return _HAN.search(text) is not None


def normalise(text: str) -> str:
    """The text less what two copies of a problem may differ in: case, white space, compatibility forms (NFKC), and how
    its mathematics is set. Digits, letters, operators and punctuation stay."""
    text = _LOWERED.sub(r"_{\g<0>}", _RAISED.sub(r"^{\g<0>}", text))
    text = _FRACTION.sub(r"\\frac", unicodedata.normalize("NFKC", text))
    text = _SPACE.sub("", " ".join(_WIDE.sub(" ", _SETTING.sub("", text)).split()))
    return _ONE_IN_BRACES.sub(r"\1", text).casefold()


def fingerprint(text: str) -> bytes:
    """16 bytes that stand for the normalised text: what a set of millions of rows is compared by."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
