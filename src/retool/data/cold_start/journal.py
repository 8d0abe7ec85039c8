"""What the teacher answered and what came of it, on the disk before anything else is done with it.

JSON Lines: the first line names the settings, each other one is an entry (or newer settings, where nothing had been
answered with the old ones). A line is appended whole and flushed to the disk; a line that a crash tore is cut off at
the next start. So an answer that was written down is never asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from retool.errors import ConfigError, DataError
from retool.store.files import claim


class Key(NamedTuple):
    """What an entry is about."""

    id: str
    """Of the problem."""
    sample: int
    of: str
    """Fingerprint of what the entry came from: it serves nothing else, whatever carries the same id."""


def fingerprint(*texts: str) -> str:
    """Changes whenever one of the texts does."""
    joined = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Journal:
    """Entries by key, the last one of a key counting. One process at a time has it.

    Args:
        settings: what all entries depend on; a journal that was begun with others is refused.
        disposable: what it holds can be worked out again, so that it is begun anew instead of being refused.

    Raises:
        ConfigError: it was begun with other settings.
        DataError: the file cannot be written, another process has it, or a line that is whole is no entry.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, disposable: bool = False) -> None:
        self.path = path
        self.entries: dict[Key, dict[str, Any]] = {}
        self._descriptor = _open(path)
        try:
            self._read(settings, disposable)
        except BaseException:
            self.close()
            raise

    def _read(self, settings: dict[str, Any], disposable: bool) -> None:
        whole = self.path.read_bytes()
        self._end = whole.rfind(b"\n") + 1
        try:
            begun = self._take(whole[: self._end].splitlines())
            if begun is not None:
                self._refuse_others(begun, settings)
        except (ConfigError, DataError):
            if not disposable:
                raise
            begun, self.entries, self._end = None, {}, 0
        os.ftruncate(self._descriptor, self._end)
        if begun != settings:
            self._append({"settings": settings})

    def _take(self, lines: list[bytes]) -> dict[str, Any] | None:
        """Read the entries, and answer the settings that hold for them; None in an empty file."""
        begun: dict[str, Any] | None = None
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if "settings" in entry:
                    begun = dict(entry["settings"])
                elif begun is not None:
                    self.entries[Key(str(entry["id"]), int(entry["sample"]), str(entry["of"]))] = entry
            except (ValueError, KeyError, TypeError):
                if begun is not None:
                    raise DataError(f"{self.path}, line {number}: no entry of a journal; remove the line") from None
            if begun is None:
                raise DataError(f"{self.path}: no journal of this command; give another --out")
        return begun

    def _refuse_others(self, begun: dict[str, Any], settings: dict[str, Any]) -> None:
        # What only failed, by a misspelt --model for one, binds nobody.
        if all("failed" in entry for entry in self.entries.values()):
            return
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ConfigError(
                    f"{name} = {value!r}: {self.path} was begun with {begun.get(name)!r}; give that, another --out, or "
                    "--restart to ask for everything anew"
                )

    def add(self, key: Key, entry: dict[str, Any]) -> None:
        """Write an entry down; when this returns, it is on the disk."""
        entry = {**key._asdict(), **entry}
        self._append(entry)
        self.entries[key] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        try:
            if os.pwrite(self._descriptor, line, self._end) < len(line):
                raise OSError("no space left on the device")
            os.fdatasync(self._descriptor)
        except OSError as error:
            # What came of the line is cut off at the next start, or written over by the next line.
            raise DataError(
                f"{self.path}: {error.strerror or error}; make room and start again, nothing else is lost"
            ) from None
        self._end += len(line)

    def close(self) -> None:
        os.close(self._descriptor)


def set_aside(path: Path, aside: Path) -> None:
    """Give a journal another name, in place of what has it now.

    Raises:
        DataError: it cannot be done, or another process has the journal.
    """
    if not path.exists():
        return
    descriptor = _open(path)
    try:
        path.replace(aside)
    except OSError as error:
        raise _unfit(path, error) from None
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The file, open and ours alone; its name is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unfit(path, error) from None
    if not claim(descriptor):
        os.close(descriptor)
        raise DataError(f"{path}: another 'retool cold-start' is writing it; wait for its end, or give another --out")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return descriptor


def _unfit(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: {error.strerror or error}; give a place that can be written")
