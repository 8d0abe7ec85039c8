"""What came of a run: counts for people and for files, statistics of the code, and a few samples to read."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retool.data.cold_start.checks import Checked

SAMPLES = 3
"""Kept answers to read, and one rejected for each reason."""


@dataclass
class ColdStartReport:
    """Counts. ``wanted`` = answered + failed + not asked yet; ``answered`` = kept + rejected + undecided."""

    problems: int = 0
    """Of the set, after cleaning."""
    cleaning: dict[str, Any] = field(default_factory=dict)
    """``prepare.Report`` of the problems: read, dropped and why."""
    wanted: int = 0
    """Problems × samples."""
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that got no answer; the next start asks again."""
    said: dict[str, str] = field(default_factory=dict)
    """The teacher's words to one failure for each reason, where it said something."""
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    undecided: int = 0
    """The sandbox failed; the next start checks them again."""
    thoughts: int = 0
    """Answers before which a reasoning model's thoughts stood."""
    requests: int = 0
    """Of all runs of this journal, retries included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    """Of completions that held no answer."""
    guessed: int = 0
    """Answers whose tokens the server did not count."""
    budget_spent: bool = False
    given_up: str = ""
    """Why the teacher was left alone before all was asked."""
    code: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Of the last run."""

    @property
    def left(self) -> int:
        """Answers that are still to be asked for."""
        return self.wanted - self.answered

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "failed": dict(self.failed), "rejected": dict(self.rejected), "left": self.left}

    def table(self) -> list[list[int | str]]:
        """Rows for a terminal."""
        rows: list[list[int | str]] = [["problems", self.problems]]
        rows += [[f"problems dropped: {why}", n] for why, n in self.cleaning.get("dropped", {}).items()]
        rows += [["answers wanted", self.wanted], ["answered", self.answered], ["kept", self.kept]]
        rows += [[f"rejected, {reason}", count] for reason, count in sorted(self.rejected.items())]
        rows += [[f"failed, {reason}", count] for reason, count in sorted(self.failed.items())]
        rows += [["undecided: the sandbox failed", self.undecided]] if self.undecided else []
        rows += [["still to ask", self.left]] if self.left else []
        rows += [["with thoughts before it", self.thoughts]] if self.thoughts else []
        rows += [
            ["requests", self.requests],
            ["tokens, prompts", self.prompt_tokens],
            ["tokens, answers", self.completion_tokens],
        ]
        rows += [["tokens, lost", self.lost_tokens]] if self.lost_tokens else []
        rows += [["answers whose tokens are a guess", self.guessed]] if self.guessed else []
        for name, value in self.code.items():
            if not isinstance(value, dict):
                rows.append([name, value])
            elif value:
                rows.append([name, ", ".join(f"{key} {count}" for key, count in value.items())])
        return rows


def code_statistics(kept: Sequence[Checked]) -> dict[str, Any]:
    """Of the programs in the kept answers."""
    programs = [program for checked in kept for program in checked.programs]
    lines = sum(1 for program in programs for line in program.splitlines() if line.strip())
    libraries = Counter(name for checked in kept for name in set().union(*map(imports, checked.programs)))
    return {
        "programs": len(programs),
        "programs a row": round(len(programs) / len(kept), 2) if kept else 0.0,
        "lines a program": round(lines / len(programs), 2) if programs else 0.0,
        "seconds executed": round(sum(checked.seconds for checked in kept), 1),
        "outputs replaced": sum(checked.replaced for checked in kept),
        "runs by status": dict(sum((checked.statuses for checked in kept), Counter[str]()).most_common()),
        "rows that import": dict(libraries.most_common(10)),
    }


def imports(program: str) -> set[str]:
    """The packages that a program imports; none where it cannot be parsed."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError):
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def samples_page(kept: Iterable[Mapping[str, str]], rejected: Mapping[str, Mapping[str, str]]) -> str:
    """A few answers in Markdown: kept ones, and one for each reason to reject."""
    parts = ["# Samples\n"]
    for shown in kept:
        parts.append(f"## Kept: {shown['id']}\n\n{shown['question']}\n\n---\n\n{shown['text']}\n")
    for reason, shown in sorted(rejected.items()):
        parts.append(
            f"## Rejected, {reason}: {shown['id']}\n\n{shown['question']}\n\nTruth: {shown['answer']}\n\n---\n\n"
            f"{shown['text']}\n"
        )
    return "\n".join(parts)
