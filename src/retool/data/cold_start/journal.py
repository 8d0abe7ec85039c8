"""What the teacher answered and what came of it, on the disk before anything else is done with it.

JSON Lines: the first line names the settings, each other one is an entry. A line is appended whole and flushed to the
disk; a line that a crash tore is cut off at the next start. So an answer that was written down is never asked for
again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from retool.errors import ConfigError, DataError

Key = tuple[str, int]
"""Problem's id and number of the sample."""


class Journal:
    """Entries by ``(id, sample)``, the last one of a key counting.

    Args:
        settings: what the entries depend on; a journal that was begun with others is refused.

    Raises:
        ConfigError: it was begun with other settings.
        DataError: the file cannot be written, or a line that is whole is no entry.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.entries: dict[Key, dict[str, Any]] = {}
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            whole = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; give a place that can be written") from None
        self._end = whole.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, self._end)
        lines = whole[: self._end].splitlines()
        if lines:
            self._check(lines[0], settings)
        else:
            self._append({"settings": settings})
        for number, line in enumerate(lines[1:], start=2):
            try:
                entry = json.loads(line)
                self.entries[str(entry["id"]), int(entry["sample"])] = entry
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {number}: no entry of a journal; remove the line") from None

    def _check(self, line: bytes, settings: dict[str, Any]) -> None:
        try:
            begun = json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.path}: no journal of this command; give another --out") from None
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ConfigError(
                    f"{name} = {value!r}: {self.path} was begun with {begun.get(name)!r}; give that, another --out, or "
                    "--restart to ask for everything anew"
                )

    def add(self, key: Key, entry: dict[str, Any]) -> None:
        """Write an entry down; when this returns, it is on the disk."""
        entry = {"id": key[0], "sample": key[1], **entry}
        self._append(entry)
        self.entries[key] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        written = os.pwrite(self._descriptor, line, self._end)
        if written < len(line):
            raise DataError(f"{self.path}: the disk is full; make room and start again, nothing is lost")
        os.fdatasync(self._descriptor)
        self._end += len(line)

    def close(self) -> None:
        os.close(self._descriptor)
