"""From a set as it was published to the problems that are trained on, with a report of what was dropped and why."""

from __future__ import annotations

import hashlib
import io
import resource
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from retool.data.cleaning import fingerprint, is_chinese, strip_wrapper
from retool.data.decontaminate import NGRAM, Index
from retool.data.problem import Problem
from retool.data.sets import SETS, load_problems, split_spec
from retool.errors import DataError
from retool.formats.calls import is_text
from retool.grading.equivalence import equivalent
from retool.store import write_file
from retool.store.files import to_json


def _schema(index: Any) -> Any:
    """verl's layout, so that a prepared file is training data there too."""
    text = pa.string()
    info = [("index", index), ("split", text), ("id", text), ("solution", text)]
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pa.struct(info)),
        ]
    )


@dataclass
class Report:
    """What became of a set. Each row that was read is kept or dropped for one reason."""

    name: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Further counts; each says what it counts."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was dropped, one entry a problem: ``reason``, ``id`` and ``row`` (counted from 0) where it stands first, how
    many ``rows`` where that is more than one, and what explains it."""
    seconds: float = 0.0
    peak_memory_mb: int = 0

    def drop(self, reason: str, id: str, count: int = 1, **why: Any) -> None:
        self.dropped[reason] += count
        self.rows.append({"reason": reason, "id": id, **({"rows": count} if count > 1 else {}), **why})

    def to_json(self) -> dict[str, Any]:
        """The counts, without the rows."""
        counts = {key: value for key, value in vars(self).items() if key != "rows"}
        return counts | {"dropped": dict(self.dropped)}


@dataclass
class Cleaning:
    """What is asked of a training set."""

    chinese: bool = True
    """False: drop problems that hold Chinese."""
    duplicates: bool = False
    """True: keep them, and do not look for conflicting answers."""
    against: Sequence[str] = ()
    """Evaluation sets, ``SET`` or ``SET=FILE``."""
    ngram: int = NGRAM
    share: float = 0.0
    """Overlaps with a smaller share of the evaluation problem are let pass; 0: none is."""

    def index(self) -> Index:
        """Of what ``against`` holds; an empty one matches nothing."""
        return Index(_evaluation_problems(self.against), self.ngram, self.share)

    def reads(self) -> list[str]:
        """The places that ``against`` names."""
        return [file or name for name, file in map(split_spec, self.against)]


class _Copies:
    """The rows of one problem."""

    def __init__(self, first: Problem, row: int) -> None:
        self.first, self.row, self.rows = first, row, 0
        self.answers: list[str] = []
        self.chinese = is_chinese(first.question)

    def add(self, answer: str) -> None:
        self.rows += 1
        if not any(answer == known or equivalent(answer, known) for known in self.answers):
            self.answers.append(answer)


class _Spelling:
    """The rows whose questions are equal to the byte: a set may repeat each of them a hundred times."""

    def __init__(self, copies: _Copies, wrapped: bool) -> None:
        self.copies, self.wrapped = copies, wrapped
        self.rows = 0
        self.answers: set[str] = set()


def clean(problems: Iterable[Problem], wanted: Cleaning, report: Report) -> list[Problem]:
    """The problems to train on, in their order. Of a problem that occurs several times (``cleaning.normalise``) the
    first row is kept; one whose rows have different answers is dropped whole, since none of them can be trusted.

    The problems that are kept are held in memory, their copies are not.
    """
    index = wanted.index()
    found: dict[bytes, _Copies] = {}
    spellings: dict[bytes, _Spelling] = {}
    for row, problem in enumerate(problems):
        report.read += 1
        own = report.read.to_bytes(8, "big") if wanted.duplicates else b""
        exact = own or hashlib.blake2b(problem.question.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not problem.answer:
            report.drop("no answer", problem.id, row=row)
            continue
        spelling = spellings.get(exact)
        if spelling is None:
            if not all(map(is_text, (problem.id, problem.question, problem.answer, problem.solution))):
                report.drop("broken Unicode", problem.id, row=row)
                continue
            bare = strip_wrapper(problem.question)
            if not bare:
                report.drop("no question", problem.id, row=row)
                continue
            copies = found.setdefault(own or fingerprint(bare), _Copies(replace(problem, question=bare), row))
            spelling = spellings[exact] = _Spelling(copies, bare != problem.question.strip())
        spelling.rows += 1
        spelling.answers.add(problem.answer)
        spelling.copies.add(problem.answer)
    index.learn_phrases(copies.first.question for copies in found.values())
    kept = [copies.first for copies in found.values() if _is_kept(copies, index, wanted.chinese, report)]
    report.kept = len(kept)
    report.notes |= _notes(found.values(), spellings.values())
    return kept


def _notes(found: Collection[_Copies], spellings: Collection[_Spelling]) -> dict[str, int]:
    return {
        "different problems": len(found),
        "rows with a wrapper around the question": sum(s.rows for s in spellings if s.wrapped),
        "rows with Chinese": sum(copies.rows for copies in found if copies.chinese),
        "rows equal to an earlier one to the byte": sum(s.rows - 1 for s in spellings),
        "questions equal to the byte with different answers": sum(len(s.answers) > 1 for s in spellings),
        "problems with different answers": sum(len(copies.answers) > 1 for copies in found),
    }


def _evaluation_problems(specs: Iterable[str]) -> Iterator[Problem]:
    """The problems of evaluation sets, each ``SET`` or ``SET=FILE``: of the test split, where a set has one."""
    for spec in specs:
        name, file = split_spec(spec)
        for problem in load_problems(name, file=file, split="test" if "test" in _splits(name) else ""):
            yield replace(problem, question=strip_wrapper(problem.question))


def _splits(name: str) -> Collection[str]:
    return SETS[name].splits if name in SETS else ()


def _is_kept(copies: _Copies, index: Index, chinese: bool, report: Report) -> bool:
    problem = copies.first
    if copies.chinese and not chinese:
        report.drop("Chinese", problem.id, copies.rows, row=copies.row)
        return False
    if len(copies.answers) > 1:
        report.drop(
            "conflicting answers", problem.id, copies.rows,
            row=copies.row, answers=copies.answers, question=problem.question,
        )  # fmt: skip
        return False
    if copies.rows > 1:
        report.drop("duplicate", problem.id, copies.rows - 1, row=copies.row)
    match = index.match(problem.question)
    if match is None:
        return True
    for least in (1.0, 0.8, 0.5):
        note = f"contaminated rows, copies included, that share at least {least:.0%}"
        report.notes[note] = report.notes.get(note, 0) + (copies.rows if match.share >= least else 0)
    report.drop(
        "contaminated", problem.id, 1, row=copies.row,
        evaluation=match.id, kind=match.kind, share=round(match.share, 3), shared=match.text, question=problem.question,
    )  # fmt: skip
    return False


def prepare(
    spec: str,
    out: Path,
    *,
    file: str = "",
    columns: Mapping[str, str] | None = None,
    split: str = "",
    limit: int = 0,
    wanted: Cleaning | None = None,
) -> Report:
    """Write the cleaned problems of a set to ``out`` (Parquet in verl's layout), the report's counts beside it
    (``.report.json``) and what was dropped (``.dropped.jsonl``).

    Args:
        limit: problems to keep at most; 0: all.

    Raises:
        ConfigError, DataError: see ``sets.load_problems``; or nothing is left.
    """
    started = time.perf_counter()
    report = Report(spec)
    wanted = wanted or Cleaning()
    check_out(out, file or spec, *wanted.reads())
    kept = clean(load_problems(spec, file=file, columns=columns, split=split), wanted, report)
    if limit and len(kept) > limit:
        report.dropped["over --limit"] = len(kept) - limit
        kept, report.kept = kept[:limit], limit
    if not kept:
        raise DataError(
            f"{file or spec}: none of {report.read} rows is left ({dict(report.dropped)}); nothing is written"
        )
    write_problems(out, kept, split or next(iter(_splits(spec)), "train"))
    close_report(out, report, started)
    return report


def check_out(out: Path, *sources: str) -> None:
    """Refuse an output that cannot be written, or that would take the place of what is read, before anything is read.

    Raises:
        DataError: names the path and the mend.
    """
    if out.suffix != ".parquet":
        raise DataError(f"--out {str(out)!r}: the output is Parquet; give a name that ends in .parquet")
    if out.is_dir():
        raise DataError(f"--out {str(out)!r} is a folder; give a file's name")
    for source in filter(None, sources):
        for written in (out, *(beside(out, ending) for ending in ENDINGS)):
            if Path(source).exists() and written.exists() and written.resolve().is_relative_to(Path(source).resolve()):
                raise DataError(f"--out {str(out)!r}: {str(written)!r} is the input itself; give another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {str(out)!r}: {error.strerror or error}; give a place that can be written") from None


ENDINGS = ("report.json", "dropped.jsonl")
"""What stands beside the file."""


def beside(out: Path, ending: str) -> Path:
    """``data/x.parquet`` and ``report.json`` make ``data/x.report.json``."""
    return out.with_name(f"{out.stem}.{ending}")


def close_report(out: Path, report: Report, started: float) -> None:
    """Add what the work took since ``started`` (``time.perf_counter``), and write the counts and what was dropped.

    Raises:
        DataError: a file cannot be written.
    """
    report.seconds = round(time.perf_counter() - started, 2)
    report.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_counts(out, report.to_json())
    write_lines(beside(out, "dropped.jsonl"), report.rows)


def write_counts(out: Path, counts: Mapping[str, Any]) -> None:
    """The file of counts beside ``out``. Raises as ``write_whole``."""
    write_whole(beside(out, "report.json"), to_json(counts, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file. Raises as ``write_whole``."""
    write_whole(path, "".join(to_json(row) + "\n" for row in rows))


def write_whole(path: Path, content: bytes | str) -> None:
    """Write the file whole, or not at all; its folder is made where there is none.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); give another place") from None


def write_problems(out: Path, problems: Sequence[Problem], split: str) -> None:
    """The file whole, or not at all; ``sets.load_problems`` reads it back to the same problems, but for their ``meta``.

    Raises:
        DataError: the file cannot be written.
    """
    named = any(isinstance(p.index, str) or (p.index is not None and p.index.bit_length() > 63) for p in problems)
    rows = [
        {
            "data_source": problem.source,
            "prompt": [{"role": "user", "content": problem.question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "index": str(problem.index) if named and problem.index is not None else problem.index,
                "split": split,
                "id": problem.id,
                "solution": problem.solution,
            },
        }
        for problem in problems
    ]
    sink = io.BytesIO()
    schema = _schema(pa.string() if named else pa.int64())
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    write_whole(out, sink.getvalue())
