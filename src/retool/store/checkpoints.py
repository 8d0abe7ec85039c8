"""Checkpoint folders: sums that show a changed byte, and which of them are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from retool.store.files import GONE, to_json, write_file

CHECKSUMS = "checksums.json"


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file in ``folder`` into its ``checksums.json``."""
    sums = {str(file.relative_to(folder)): _sum(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_file(folder / CHECKSUMS, to_json(sums, indent=1) + "\n")


def fault_of(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is missing or has other bytes; None where all is well. A
    folder without sums is taken as it is."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _sum(file) != expected:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    return None


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(folders: Iterable[Path]) -> None:
    """Remove checkpoints, each under another name first: half of one must not pass for a whole one."""
    for folder in folders:
        aside = folder.with_name(f".{folder.name}{GONE}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


__all__ = ["CHECKSUMS", "fault_of", "remove", "seal"]
