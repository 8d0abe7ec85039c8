"""Writing so that a crash leaves the old state or the new one, and ``metrics.jsonl``."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retool.errors import DataError

ASIDE, OLD, GONE = ".aside", ".old", ".gone"

log = logging.getLogger(__name__)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file aside, flush it to the disk and rename it into place."""
    aside = path.with_name(f".{path.name}{ASIDE}")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)


@contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """Fill the folder that this yields. Left without an exception, it is flushed and becomes ``path``, in place of what
    was there; else nothing changes.

    A folder cannot replace another in one step: a crash between the two renames leaves the old one as ``.NAME.old``,
    and ``recover`` puts it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = path.with_name(f".{path.name}{ASIDE}"), path.with_name(f".{path.name}{OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for entry in [*aside.rglob("*"), aside]:
        _sync(entry)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    aside.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo what a crash left half done in ``folder``."""
    for entry in list(folder.glob(f".*{OLD}")):
        target = folder / entry.name.removeprefix(".").removesuffix(OLD)
        if target.exists():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.rename(target)
    for entry in [*folder.glob(f".*{ASIDE}"), *folder.glob(f".*{GONE}")]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def claim(descriptor: int) -> bool:
    """Lock an open file or folder for this process until it is closed; False where another process has it. A file
    system without locks is taken on trust: there the user has to see to it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


class JsonlTracker:
    """``protocols.Tracker`` into a JSON Lines file: one line a step, written and flushed whole. What is not finite is
    written as null. A disk that fails is reported once to the log and never ends the run."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        whole = path.read_bytes()
        # a line that a crash tore must not swallow the next one
        self._end = whole.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, self._end)
        self._failed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        line = (to_json({"step": step} | metrics) + "\n").encode()
        try:
            if os.pwrite(self._descriptor, line, self._end) < len(line):
                raise OSError("the line was written in part")
            os.fsync(self._descriptor)  # a checkpoint, which is flushed too, stands for a step whose line is there
            self._end += len(line)
        except OSError as error:
            if not self._failed:
                log.warning("metrics of step %d could not be written: %s", step, error)
            self._failed = True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a ``metrics.jsonl`` in order, ``step`` among their keys; null reads as NaN. A torn last line is
    ignored; no file is no steps.

    Raises:
        DataError: a line before the last is not a JSON object with a ``step``.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
            rows.append({str(k): math.nan if v is None else float(v) for k, v in row.items()})
            rows[-1]["step"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}, line {number}: not a JSON object of numbers with a step; remove it") from None
    return rows


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``; the others stay as they are, byte for byte.

    Raises:
        DataError: as ``read_metrics``.
    """
    kept = [line for line, row in zip(_whole_lines(path), read_metrics(path), strict=True) if row["step"] <= step]
    write_file(path, b"".join(line + b"\n" for line in kept))
