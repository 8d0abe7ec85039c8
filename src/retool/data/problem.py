"""A problem of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from retool.data.prompts import prompt_messages
from retool.types import Task


@dataclass(frozen=True)
class Problem:
    """A problem with a known answer."""

    id: str
    """Unique in its set: ``aime-2025/17``; rows count from 0."""
    source: str
    question: str
    """As it stands in the set, white space around it included."""
    answer: str
    solution: str = ""
    index: int | str | None = None
    """``extra_info.index``, where the set has it: a number or, in DAPO-Math-17k as published, a UUID."""
    meta: dict[str, Any] = field(default_factory=dict)

    def task(self) -> Task:
        return Task(self.id, self.source, prompt_messages(self.question.strip()), self.answer, self.meta)
