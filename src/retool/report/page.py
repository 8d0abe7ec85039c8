"""The report as one HTML file: no script, no network, nothing outside the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.metrics import definition
from retool.report.figures import NARROW_SPACE, Figure, draw_accuracy, draw_panels, shown
from retool.report.load import Curve, Report, Stage, load, number
from retool.report.transcripts import choose_problems
from retool.store import write_file

TABLE_ROWS = 40
"""Steps shown in the table of numbers; longer runs are thinned evenly."""
TABLE_COLUMNS = {
    "acc/mean": "accuracy",
    "tool/call_rate": "call rate",
    "num_turns/mean": "turns",
    "response_length/mean": "tokens",
    "critic/score/mean": "reward",
    "actor/entropy": "entropy",
    "group/zero_variance_share": "no signal",
}
GLOSSARY = ("accuracy", "ci95", "call_rate", "num_turns", "pass@1")
COMMIT_LENGTH = 10


def percent(value: float | None) -> str:
    return "–" if value is None else shown(value, percent=True)


def precise(value: float | None) -> str:
    """A share with a decimal, for the table that is quoted."""
    return "–" if value is None else f"{100 * value:.1f}{NARROW_SPACE}%"


def duration(seconds: float) -> str:
    """Wall time as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _in_sentence(stage: Stage) -> str:
    """GRPO stays GRPO."""
    return stage.title.lower() if stage.key in ("base", "sft") else stage.title


def story(report: Report) -> str:
    """What happened, in a sentence or two made of the measured numbers; empty where no stage was evaluated."""
    measured = [(s, a) for s in report.stages if (a := s.number("accuracy")) is not None]
    chain = [(s, a) for s, a in measured if s.key != "text_only"]
    if not chain:
        return _story_of_steps(report)
    last, accuracy = chain[-1]
    problems = last.number("problems") or last.number("samples") or 0
    on = f"On {problems:,.0f} problems" if problems else "In the evaluation"
    if len(chain) == 1:
        text = f"{on}, {last.title} is right in {percent(accuracy)}"
    else:
        start, *middle, end = [f"{percent(a)} ({_in_sentence(s)})" for s, a in chain]
        text = f"{on}, accuracy went from {start} to {', '.join(middle)}{' and ' if middle else ''}{end}"
    calls = last.number("call_rate")
    text += f"; the model ran code on {percent(calls)} of them." if calls is not None else "."
    control = next((a for s, a in measured if s.key == "text_only"), None)
    if control is not None:
        text += f" The same training without the tool reached {percent(control)}."
    return text


def _story_of_steps(report: Report) -> str:
    for curve in report.curves[:1]:
        steps, values = curve.points("acc/mean")
        if len(steps) > 1:
            return (
                f"Over {len(steps)} steps, accuracy on the training batch went from {percent(values[0])} "
                f"to {percent(values[-1])}."
            )
    return ""


def facts(report: Report) -> list[tuple[str, str]]:
    """How the run was made: name and value, what is known of it."""
    environment, summary, config = report.environment, report.summary, report.config
    seconds = number(summary.get("wall_seconds"))
    versions = environment.get("versions")
    model = config.get("model")
    commit = environment.get("git_commit")
    found = {
        "Wall time": duration(seconds) if seconds is not None else None,
        "Seed": summary.get("seed", environment.get("seed")),
        "Model": model.get("path") if isinstance(model, dict) else None,
        "Device": environment.get("device"),
        "Cores": environment.get("cores"),
        "Made": str(environment.get("time", ""))[:10] or None,
        "ReTool": versions.get("retool") if isinstance(versions, dict) else None,
        "Commit": str(commit)[:COMMIT_LENGTH] if commit else None,
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


@dataclass(frozen=True)
class StageRow:
    """A line of the table of stages; shares lie between 0 and 1."""

    title: str
    accuracy: float | None
    low: float | None
    high: float | None
    cells: list[tuple[str, str]]


def stage_rows(stages: Sequence[Stage]) -> list[StageRow]:
    rows = []
    for stage in stages:
        if not stage.summary:
            continue
        low, high = stage.interval or (None, None)
        turns, samples = stage.number("num_turns"), stage.number("samples")
        cells = [
            ("95 % interval", "–" if low is None or high is None else f"{100 * low:.1f} – {100 * high:.1f}"),
            ("ran code", percent(stage.number("call_rate"))),
            ("right with code", percent(stage.number("accuracy_with_call"))),
            ("right without", percent(stage.number("accuracy_without_call"))),
            ("turns", "–" if turns is None else f"{turns:.2f}"),
            ("samples", "–" if samples is None else f"{samples:,.0f}"),
        ]
        rows.append(StageRow(stage.title, stage.number("accuracy"), low, high, cells))
    return rows


@dataclass(frozen=True)
class FamilyRow:
    """A line of the heat table: one ``(accuracy, call rate)`` a stage, None where the stage has no such family."""

    name: str
    cells: list[tuple[float, float | None] | None]


def family_rows(stages: Sequence[Stage]) -> list[FamilyRow]:
    """Families by the accuracy of the last stage of the chain, the best first."""
    names = sorted({name for stage in stages for name in stage.families})
    rows = []
    for name in names:
        cells: list[tuple[float, float | None] | None] = []
        for stage in stages:
            family = stage.families.get(name, {})
            accuracy = number(family.get("accuracy"))
            cells.append(None if accuracy is None else (accuracy, number(family.get("call_rate"))))
        rows.append(FamilyRow(name.replace("_", " "), cells))
    chain = [index for index, stage in enumerate(stages) if stage.key != "text_only"]
    judge = chain[-1] if chain else 0

    def rank(row: FamilyRow) -> tuple[float, str]:
        cell = row.cells[judge]
        return (-cell[0] if cell else 1.0, row.name)

    return sorted(rows, key=rank)


@dataclass(frozen=True)
class NumberTable:
    """The numbers behind the curves, for those who cannot or would rather not read a picture."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def number_tables(curves: Sequence[Curve]) -> list[NumberTable]:
    tables = []
    for curve in curves:
        names = [name for name in TABLE_COLUMNS if curve.points(name)[0]]
        stride = max(1, -(-len(curve.rows) // TABLE_ROWS))
        picked = curve.rows[::stride]
        if curve.rows[-1] is not picked[-1]:
            picked = [*picked, curve.rows[-1]]
        rows = [[f"{row['step']:.0f}", *(_cell(row, name) for name in names)] for row in picked]
        tables.append(NumberTable(curve.title, ["step", *(TABLE_COLUMNS[name] for name in names)], rows))
    return tables


def _cell(row: dict[str, float], name: str) -> str:
    value = number(row.get(name))
    return "–" if value is None else shown(value)


def _glossary(report: Report) -> list[tuple[str, str]]:
    names = [name for name in GLOSSARY if any(name in stage.summary for stage in report.stages)]
    return [(name, text) for name in names if (text := definition(name))]


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("retool", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "precise": precise}
    accuracy: Figure | None = draw_accuracy(report)
    measured = [stage for stage in report.stages if stage.summary]
    context: dict[str, Any] = {
        "name": report.name,
        "story": story(report),
        "facts": facts(report),
        "stages": stage_rows(measured),
        "family_stages": [stage.title for stage in measured],
        "families": family_rows(measured),
        "accuracy": accuracy,
        "panels": draw_panels(report),
        "curves": [curve.title for curve in report.curves],
        "tables": number_tables(report.curves),
        "choice": choose_problems(report.stages),
        "glossary": _glossary(report),
    }
    return environment.get_template("template.html").render(context)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder, from what that folder holds; returns its path.

    Raises:
        UserError: there is no run, or one of its files is broken.
    """
    path = Path(run_dir)
    page = render(load(path))
    write_file(path / "report.html", page.encode("utf-8", "replace"))
    return path / "report.html"
