"""The data sets that are known by name, and any file or hub repository, as problems with answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from retool.data.gsm8k import UnfitError, split_solution
from retool.data.problem import Problem
from retool.data.reading import FILES, Row, hub_rows, rows
from retool.errors import ConfigError, DataError

FIELDS = ("question", "answer", "solution", "id")


@dataclass(frozen=True)
class DataSet:
    """What is known of a set."""

    name: str
    hub: str
    about: str
    kind: Literal["problems", "conversations"] = "problems"
    config: str = ""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    """From our names of splits to the hub's; the first one is the default."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The columns that hold a field, in the layouts in which the set is found."""
    published: Mapping[str, int] = field(default_factory=dict)
    """Rows on the hub, by split."""


SETS = {
    s.name: s
    for s in (
        DataSet(
            "retool-sft", "JoeYing/ReTool-SFT", "cold-start trajectories with the paper's tags", "conversations",
            published={"train": 2000},
        ),
        DataSet(
            "dapo-math-17k", "BytedTsinghua-SIA/DAPO-Math-17k", "competition problems, answers are integers",
            columns={"question": ("prompt",), "answer": ("reward_model.ground_truth",)}, published={"train": 1_791_700},
        ),
        DataSet(
            "aime-2024", "Maxwell-Jia/AIME_2024", "30 problems of both AIME contests of 2024",
            columns={"question": ("Problem", "problem", "input"), "answer": ("Answer", "answer", "output"),
                     "solution": ("Solution", "solution")}, published={"train": 30},
        ),
        DataSet(
            "aime-2025", "yentinglin/aime_2025", "30 problems of both AIME contests of 2025",
            columns={"question": ("problem", "Problem", "input"), "answer": ("answer", "Answer", "output"),
                     "solution": ("solution", "Solution")}, published={"train": 30},
        ),
        DataSet(
            "math-500", "HuggingFaceH4/MATH-500", "500 problems of the MATH test set", splits={"test": "test"},
            columns={"question": ("problem",), "answer": ("answer",), "solution": ("solution",)},
            published={"test": 500},
        ),
        DataSet(
            "gsm8k", "openai/gsm8k", "grade-school word problems with annotated solutions", config="main",
            splits={"train": "train", "test": "test"},
            columns={"question": ("question",), "answer": ("answer",)}, published={"train": 7473, "test": 1319},
        ),
    )
}  # fmt: skip
_OWN_COLUMNS = {
    "question": ("question", "problem", "prompt", "input", "query"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth", "output", "target"),
    "solution": ("solution", "extra_info.solution", "rationale"),
    "id": ("id", "extra_info.id", "unique_id"),
}


def split_spec(spec: str) -> tuple[str, str]:
    """``SET=FILE`` as ``(SET, FILE)``; the file is empty where there is none. A file's own name may hold the sign."""
    if Path(spec).exists():
        return spec, ""
    name, _, file = spec.partition("=")
    return name.strip(), file.strip()


def set_name(spec: str) -> str:
    """What a set's problems are called after: its name, or that of its file."""
    return spec if spec in SETS else Path(spec).name.split(".")[0]


def is_hub_name(name: str) -> bool:
    """Whether the hub could have a repository of that name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def set_rows(spec: str, *, file: str = "", split: str = "") -> Iterator[Row]:
    """The rows of a set as they stand.

    Args:
        spec: a set's name, a file, a folder in a hub repository's layout, or a hub name ``owner/name``.
        file: a local copy of what ``spec`` names: a file, or such a folder.
        split: which split of it; empty: the set's first one.

    Raises:
        ConfigError: ``spec`` names nothing, or the set has no such split.
        DataError: see ``reading``.
    """
    known = SETS.get(spec)
    if known and split and split not in known.splits:
        raise ConfigError(f"split = {split!r}: {spec} has {', '.join(known.splits)}; choose one")
    place = file or ("" if known else spec)
    if place and Path(place).is_file():
        return rows(place)
    hub_split = known.splits[split or next(iter(known.splits))] if known else split or "train"
    if place and Path(place).is_dir():
        return hub_rows(place, hub_split, known.config if known else "")
    if file or spec.endswith(FILES):
        raise DataError(f"{place}: no such file; give the path of a file ({', '.join(FILES)}) or of a folder")
    if known:
        return hub_rows(known.hub, hub_split, known.config)
    if not is_hub_name(spec):
        raise ConfigError(
            f"data set {spec!r}: unknown; give one of {', '.join(SETS)}, a file ({', '.join(FILES)}), or owner/name"
        )
    return hub_rows(spec, hub_split)


def load_problems(
    spec: str, *, file: str = "", columns: Mapping[str, str] | None = None, split: str = ""
) -> Iterator[Problem]:
    """The problems of a set, in its order. The same rows give the same problems, wherever they come from.

    Args:
        columns: from ``question``, ``answer``, ``solution``, ``id`` to a column, or to a field inside one
            (``reward_model.ground_truth``). A question that is a chat is its last user message.

    Raises:
        ConfigError, DataError: see ``set_rows``; or a field has no column.
    """
    known = SETS.get(spec)
    if known and known.kind == "conversations":
        raise ConfigError(f"data set {spec!r} holds conversations, not problems; use it for sft")
    for name in columns or ():
        if name not in FIELDS:
            raise ConfigError(f"column {name!r}: there is no such field; map one of {', '.join(FIELDS)}")
    found = set_rows(spec, file=file, split=split)
    place = file or (known.hub if known else spec)
    source = set_name(spec)
    prefix = f"{source}/{split or next(iter(known.splits))}" if known and len(known.splits) > 1 else source
    # By what the set is, not by how a file is called; the hub's name may stand for the set's.
    annotated = spec in ("gsm8k", SETS["gsm8k"].hub)
    layout: _Layout = {}
    for number, row in enumerate(found):
        if not layout:
            layout = _layout(row, known, columns or {}, place)
        yield _problem(row, layout, source, f"{prefix}/{number}", f"{place}, row {number}", annotated)


_Layout = dict[str, list[tuple[str, ...]]]
"""The columns that may hold a field, as paths: the first that a row has does."""


def _layout(row: Row, known: DataSet | None, columns: Mapping[str, str], place: str) -> _Layout:
    """Decided by the first row, but for fields that a row may lack: JSON Lines may bring them later."""
    prepared = {"prompt", "reward_model", "extra_info"} <= row.keys()
    tried = _OWN_COLUMNS | (dict(known.columns) if known else {})
    if prepared:
        tried |= {"question": ("prompt",), "answer": ("reward_model.ground_truth",)}
    layout: _Layout = {}
    for name in FIELDS:
        choices = (columns[name],) if name in columns else tried.get(name, ())
        chosen = next((choice for choice in choices if _at(row, choice) is not _MISSING), None)
        if chosen is not None and name in ("question", "answer"):
            layout[name] = [tuple(chosen.split("."))]
        elif chosen is not None or (name in ("solution", "id") and name not in columns):
            layout[name] = [tuple(choice.split(".")) for choice in choices]
        elif name in ("question", "answer") or name in columns:
            wanted = f"the column {columns[name]!r}" if name in columns else f"a column for {name!r}"
            raise DataError(f"{place}: {wanted} is not there; it has {', '.join(row) or 'none'}; map it with a column")
    return layout


_MISSING = object()


def _at(row: Any, path: str | tuple[str, ...]) -> Any:
    for part in path.split(".") if isinstance(path, str) else path:
        if not isinstance(row, Mapping) or part not in row:
            return _MISSING
        row = row[part]
    return row


def _value(row: Row, paths: list[tuple[str, ...]]) -> Any:
    return next((value for path in paths if (value := _at(row, path)) is not _MISSING), _MISSING)


def _problem(row: Row, layout: _Layout, source: str, id: str, where: str, annotated: bool) -> Problem:
    values = {name: _at(row, paths[0]) if len(paths) == 1 else _value(row, paths) for name, paths in layout.items()}
    for name in ("question", "answer"):
        if values[name] is _MISSING:
            raise DataError(f"{where}: has no {'.'.join(layout[name][0])!r}, the column of the {name}; add it")
    question = _question(values["question"], where)
    answer, solution = _text(values["answer"], f"{where}: 'answer'"), _optional(values.get("solution"))
    if annotated and layout["answer"] == [("answer",)]:
        try:
            solution, answer = split_solution(answer)
        except UnfitError as error:
            raise DataError(f"{where}: {error}") from None
    info = row.get("extra_info")
    index = info.get("index") if isinstance(info, Mapping) else None
    # A file of ours keeps the names that its rows had, so that what is said of a row can be found again.
    prepared = isinstance(info, Mapping) and isinstance(info.get("id"), str) and isinstance(row.get("data_source"), str)
    kept = values.get("id") if prepared or source not in SETS else None
    meta = {key: row[key] for key in ("subject", "level", "unique_id") if isinstance(row.get(key), str | int)}
    return Problem(
        str(kept) if isinstance(kept, str | int) else id,
        str(row["data_source"]) if prepared else source,
        question,
        answer,
        solution,
        index if isinstance(index, int | str) else None,
        meta,
    )


def _question(value: Any, where: str) -> str:
    if isinstance(value, list):
        asked = [m.get("content") for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        value = asked[-1] if asked else _MISSING
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: the question is no text and no chat with a user message; map another column")
    return value


def _text(value: Any, where: str) -> str:
    """A cell as text; a whole number in a column of floats is that number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value:  # NaN is how pandas writes an empty cell
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where} is a {type(value).__name__}, not text or a number; map another column")
    return str(value).strip()


def _optional(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
