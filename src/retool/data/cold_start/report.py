"""What came of a run: counts for people and for files, statistics of the code, and a few samples to read."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SAMPLES = 3
"""Kept answers to read, and one rejected for each reason."""


@dataclass
class ColdStartReport:
    """Counts. ``asked`` = answered + failed + not asked yet; ``answered`` = kept + rejected + undecided."""

    problems: int = 0
    """Of the set, after cleaning."""
    cleaning: dict[str, Any] = field(default_factory=dict)
    """``prepare.Report`` of the problems: read, dropped and why."""
    wanted: int = 0
    """Problems × samples."""
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that got no answer; the next start asks again."""
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    undecided: int = 0
    """The sandbox failed; the next start checks them again."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    budget_spent: bool = False
    code: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

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
        rows += [
            ["requests", self.requests],
            ["tokens, prompts", self.prompt_tokens],
            ["tokens, answers", self.completion_tokens],
        ]
        for name, value in self.code.items():
            if not isinstance(value, dict):
                rows.append([name, value])
            elif value:
                rows.append([name, ", ".join(f"{key} {count}" for key, count in value.items())])
        return rows


def code_statistics(programs: Sequence[Sequence[str]], statuses: Counter[str], replaced: int) -> dict[str, Any]:
    """Of the kept rows.

    Args:
        programs: of each row.
        statuses: of their runs.
        replaced: outputs that were written otherwise.
    """
    whole = [program for row in programs for program in row]
    lines = [sum(1 for line in program.splitlines() if line.strip()) for program in whole]
    libraries = Counter(name for row in programs for name in set().union(*map(imports, row)) if row)
    return {
        "programs": len(whole),
        "programs a row": round(len(whole) / len(programs), 2) if programs else 0.0,
        "lines a program": round(sum(lines) / len(lines), 2) if lines else 0.0,
        "outputs replaced": replaced,
        "runs by status": dict(statuses.most_common()),
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
