"""Find the final answer, judge it, turn the verdict into a reward."""

from retool.grading.answers import extract_answer, find_answer
from retool.grading.equivalence import equivalent

__all__ = ["equivalent", "extract_answer", "find_answer"]
