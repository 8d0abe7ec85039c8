"""Whole trajectories for people: which ones to show, and how a turn falls into prose, code and output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from retool.report.load import Stage
from retool.types import ExecutionResult, ExecutionStatus, Task, ToolCall, Trajectory, Turn

PREVIEW = 4000
"""Characters of one piece that are shown: some 80 lines."""
OPENING = re.compile(r"\s*(?:<tool_call>|<code>)?\s*(?:```(?:python|py)?)?\s*$")
CLOSING = re.compile(r"^\s*(?:```)?\s*(?:</tool_call>|</code>)?\s*")
END_TOKENS = re.compile(r"(?:\s*<\|[a-z_]+\|>)+\s*$")
BOXED = re.compile(r"\\boxed\{[^{}]*\}")
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as their visible symbols: raw ones are not allowed in HTML."""


# --- one turn as pieces ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a trajectory as it is shown."""

    kind: str
    """prose, code, malformed or output."""
    html: Markup
    label: str = ""
    good: bool = True
    """False: the label names a failure."""


def visible(text: str) -> str:
    """``text`` without raw control characters, cut to what a reader looks at."""
    text = text.replace("\r\n", "\n")
    if len(text) > PREVIEW:
        text = f"{text[:PREVIEW]}\n… {len(text) - PREVIEW:,} more characters"
    return text.translate(CONTROL)


def highlight(code: str) -> Markup:
    """Python as HTML with classes; escaped, and plain where pygments is not installed."""
    code = visible(code.strip("\n"))
    try:
        from pygments import highlight as colour  # type: ignore[import-untyped]
        from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
        from pygments.lexers import PythonLexer  # type: ignore[import-untyped]
    except ImportError:
        return escape(code)
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    html: str = colour(code, lexer, HtmlFormatter(nowrap=True, classprefix="t-"))
    return Markup(html.removesuffix("\n"))


def _prose(text: str) -> Iterator[Piece]:
    text = visible(END_TOKENS.sub("", text).strip())
    if text:
        marked = BOXED.sub(lambda m: f"<mark>{m.group(0)}</mark>", str(escape(text)))
        yield Piece("prose", Markup(marked))


def _output(result: ExecutionResult) -> Piece:
    text = visible(result.text) or "(no output)"
    label = result.status.value.replace("_", " ") + (", cut" if result.truncated else "")
    return Piece("output", escape(text), label, result.status is ExecutionStatus.OK)


def _call(call: ToolCall, result: ExecutionResult | None) -> Iterator[Piece]:
    if call.code is not None:
        yield Piece("code", highlight(call.code))
    else:
        yield Piece("malformed", escape(visible(call.raw.strip())), "malformed call", good=False)
        yield Piece("output", escape(visible(call.error or "")), "not run", good=False)
    if result is not None:
        yield _output(result)


def turn_pieces(turn: Turn) -> list[Piece]:
    """Prose and calls in the order in which they were written, each call followed by what it gave."""
    pieces: list[Piece] = []
    rest = END_TOKENS.sub("", turn.text)
    for index, call in enumerate(turn.calls):
        at = rest.find(call.raw) if call.raw else -1
        if at >= 0:
            before, rest = rest[:at], CLOSING.sub("", rest[at + len(call.raw) :])
            pieces += _prose(OPENING.sub("", before))
        result = turn.executions[index] if index < len(turn.executions) else None
        pieces += _call(call, result)
    return [*pieces, *_prose(rest)]


# --- which problems to show -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One stage's trajectory on a problem."""

    stage: str
    trajectory: Trajectory

    @property
    def turns(self) -> list[list[Piece]]:
        return [pieces for turn in self.trajectory.turns if (pieces := turn_pieces(turn))]

    @property
    def prediction(self) -> str | None:
        grade = self.trajectory.grade
        return visible(grade.prediction) if grade and grade.prediction is not None else None

    @property
    def correct(self) -> bool:
        return is_right(self.trajectory)

    @property
    def ending(self) -> str:
        reason = self.trajectory.stop_reason
        return reason.value.replace("_", " ") if reason else ""


@dataclass(frozen=True)
class Problem:
    """One problem with an attempt of each stage."""

    task: Task
    why: str
    attempts: list[Attempt]

    @property
    def question(self) -> str:
        asked = [m.get("content") for m in self.task.messages if m.get("role") == "user"]
        return visible(str(asked[-1])) if asked else self.task.id


@dataclass(frozen=True)
class Choice:
    """The problems shown, and how they were found."""

    title: str
    problems: list[Problem]
    how: str


def is_right(trajectory: Trajectory) -> bool:
    return trajectory.grade is not None and trajectory.grade.correct


def ran_code(trajectory: Trajectory) -> bool:
    return any(e is not None for turn in trajectory.turns for e in turn.executions)


def recovered(trajectory: Trajectory) -> bool:
    """A run that failed, a later one that did not, and a right answer."""
    good = [e.status is ExecutionStatus.OK for turn in trajectory.turns for e in turn.executions if e is not None]
    return is_right(trajectory) and False in good and True in good[good.index(False) :]


Rule = tuple[str, int, Callable[[Trajectory, Trajectory], bool]]
RULES: tuple[Rule, ...] = (
    ("Wrong before, right after, with code", 2, lambda a, b: not is_right(a) and is_right(b) and ran_code(b)),
    ("Its code failed, it mended it", 1, lambda a, b: recovered(b)),
    ("Right without running code", 1, lambda a, b: is_right(b) and not ran_code(b)),
    ("Right before, wrong after", 1, lambda a, b: is_right(a) and not is_right(b)),
    ("Still wrong", 1, lambda a, b: not is_right(a) and not is_right(b)),
)
"""What a problem shows, how many of the kind are picked, and the test on (before, after)."""


def _spread(tasks: Sequence[Task], count: int, seen: set[str]) -> list[Task]:
    """The first ``count`` tasks, those of families not shown yet before the others."""
    picked: list[Task] = []
    for task in sorted(tasks, key=lambda t: str(t.meta.get("family")) in seen):
        family = str(task.meta.get("family"))
        if len(picked) < count and all(str(t.meta.get("family")) != family for t in picked):
            picked.append(task)
    return picked or list(tasks[:count])


def choose(stages: Sequence[Stage], before: Stage, after: Stage) -> Choice:
    """Problems that both ``before`` and ``after`` tried, by ``RULES``, with every stage's attempt at them."""
    shared = [before.attempts[i].task for i in before.attempts if i in after.attempts]
    problems: list[Problem] = []
    seen_families: set[str] = set()
    seen_tasks: set[str] = set()
    for why, count, test in RULES:
        matching = [t for t in shared if test(before.attempts[t.id], after.attempts[t.id])]
        fresh = [t for t in matching if t.id not in seen_tasks]
        for task in _spread(fresh, count, seen_families):
            seen_tasks.add(task.id)
            seen_families.add(str(task.meta.get("family")))
            tried = [Attempt(s.title, s.attempts[task.id]) for s in stages if task.id in s.attempts]
            problems.append(Problem(task, f"{why}: {len(matching)} of {len(shared)} problems", tried))
    how = (
        f"Picked by rule, not by hand: for each kind the first problems in the file, of different families where "
        f"possible. Before is {before.title}, after is {after.title}; the counts say how common a kind is."
    )
    return Choice("The same problems, before and after", problems, how)


def choose_apart(stages: Sequence[Stage], each: int = 2) -> Choice:
    """Where stages share no problem: the first right and the first wrong attempt of each stage."""
    problems = []
    for stage in stages:
        tried = list(stage.attempts.values())
        right, wrong = [t for t in tried if is_right(t)], [t for t in tried if not is_right(t)]
        for trajectory in [*right[: each // 2], *wrong[: each - each // 2]]:
            kind = "right" if is_right(trajectory) else "wrong"
            count = len(right if is_right(trajectory) else wrong)
            why = f"{stage.title}, {kind}: {count} of {len(tried)} problems"
            problems.append(Problem(trajectory.task, why, [Attempt(stage.title, trajectory)]))
    return Choice(
        "Whole trajectories",
        problems,
        "The first right and the first wrong attempt of each; no problem was tried by two.",
    )


def choose_problems(stages: Sequence[Stage]) -> Choice | None:
    """What to show of the stages that kept trajectories; None where none did. "Before" is the first of them, "after"
    is GRPO where it is there, else the last."""
    kept = [stage for stage in stages if stage.attempts]
    if not kept:
        return None
    before = kept[0]
    after = next((stage for stage in kept if stage.key == "grpo"), kept[-1])
    if before is after or not before.attempts.keys() & after.attempts.keys():
        return choose_apart(kept)
    return choose(kept, before, after)
