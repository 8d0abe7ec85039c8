"""Finding training problems that an evaluation set holds too.

A problem is contaminated where its normalised text (``cleaning.normalise``) is that of an evaluation problem, or where
it shares a run of ``ngram`` words with one (13 by default). A word is what stands between white space, less everything
but letters and digits; a Chinese character is a word of its own. A problem that has fewer words than that can only be
matched whole.

As in Brown et al. 2020 (GPT-3, appendix C), a run that more than ten training problems hold is a turn of phrase ("where
m and n are relatively prime positive integers, find m + n") and counts for nothing, unless the two problems share at
least half of what there is to share.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from retool.data.cleaning import fingerprint
from retool.data.problem import Problem

NGRAM = 13
COMMON = 10
"""A run that more training problems hold is a turn of phrase (Brown et al. 2020, appendix C)."""
ALIKE = 0.5
"""With this share of its runs two problems are versions of each other, however common the runs are."""
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")


class Match(NamedTuple):
    """Why a problem counts as contaminated."""

    id: str
    """Of the evaluation problem."""
    kind: str
    """``exact`` or ``ngram``."""
    text: str
    """The words that both hold; the whole question for an exact match."""
    share: float
    """Share of the evaluation problem's runs of n words that the training problem holds; 1 for an exact match. A common
    turn of phrase gives a small one, another version of the same problem a large one."""


def words(text: str) -> list[str]:
    """The words that runs are made of."""
    found: list[str] = []
    for piece in unicodedata.normalize("NFKC", text).casefold().split():
        parts = _WORD.findall(piece)
        plain = "".join(part for part in parts if not _is_han(part))
        found += [part for part in parts if _is_han(part)] if not plain else _in_order(parts)
    return found


def _is_han(part: str) -> bool:
    return len(part) == 1 and "\u3400" <= part <= "\ufaff" and _WORD.fullmatch(part) is not None and not part.isascii()


def _in_order(parts: list[str]) -> list[str]:
    """A piece's letters and digits as one word, cut where a Chinese character stands between."""
    found, word = [], ""
    for part in parts:
        if _is_han(part):
            found += [word, part] if word else [part]
            word = ""
        else:
            word += part
    return [*found, word] if word else found


class Index:
    """The problems that must not be learnt.

    Args:
        problems: of the evaluation sets.
        ngram: words of a run.
        share: overlaps with a smaller share of the evaluation problem are let pass.
    """

    def __init__(self, problems: Iterable[Problem], ngram: int = NGRAM, share: float = 0.0) -> None:
        self.ngram, self.share = ngram, share
        self._exact: dict[bytes, str] = {}
        self._runs: dict[tuple[str, ...], list[str]] = {}
        self._sizes: dict[str, int] = {}
        self._phrases: set[tuple[str, ...]] = set()
        for problem in problems:
            self._exact.setdefault(fingerprint(problem.question), problem.id)
            runs = set(self._runs_of(problem.question))
            self._sizes[problem.id] = len(runs)
            for run in runs:
                self._runs.setdefault(run, []).append(problem.id)

    def __len__(self) -> int:
        return len(self._sizes)

    def _runs_of(self, text: str) -> list[tuple[str, ...]]:
        found = words(text)
        return [tuple(found[i : i + self.ngram]) for i in range(len(found) - self.ngram + 1)]

    def learn_phrases(self, questions: Iterable[str]) -> None:
        """Count how many of the (different) training problems hold a run; the common ones are turns of phrase."""
        if not self._sizes:
            return
        counts = Counter(run for q in questions for run in set(self._runs_of(q)) if run in self._runs)
        self._phrases = {run for run, count in counts.items() if count > COMMON}

    def match(self, question: str) -> Match | None:
        """The evaluation problem that the question overlaps with the most; None where there is none."""
        if not self._sizes:
            return None
        same = self._exact.get(fingerprint(question))
        if same is not None:
            return Match(same, "exact", question, 1.0)
        shared: dict[str, list[tuple[str, ...]]] = {}
        for run in dict.fromkeys(self._runs_of(question)):
            for id in self._runs.get(run, ()):
                shared.setdefault(id, []).append(run)
        shares = {id: len(runs) / self._sizes[id] for id, runs in shared.items()}
        telling = [id for id in shared if shares[id] >= ALIKE or not self._phrases.issuperset(shared[id])]
        nearest = max(telling, key=lambda id: (shares[id], id), default=None)
        if nearest is None or shares[nearest] < self.share:
            return None
        return Match(nearest, "ngram", " ".join(shared[nearest][0]), shares[nearest])
