"""Rows of a file, a folder or a hub repository, one after the other: nothing is held but a batch."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retool.errors import DataError

Row = dict[str, Any]

FILES = (".parquet", ".jsonl", ".jsonl.gz", ".json")
_BATCH = 4096
_MEND = "give a local copy (--file on the command line, data.train_file or data.test_file in a recipe)"


def rows(path: str | Path) -> Iterator[Row]:
    """The rows of a Parquet, JSON Lines or JSON file (a list of objects).

    Raises:
        DataError: the file cannot be read, is not what its name says, or holds no row; names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a file ({', '.join(FILES)})"
        )
    if path.suffix == ".parquet":
        found = _parquet(path)
    elif path.suffix == ".json":
        found = _json(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        found = _json_lines(path)
    else:
        raise DataError(f"{path}: what it holds cannot be told from its name; use one of {', '.join(FILES)}")
    empty = True
    for row in found:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no rows")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no whole Parquet file ({str(error).splitlines()[0]}); fetch it again") from None


def _json_lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield _object(text, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None


def _object(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); write one JSON object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object; write one JSON object per line")
    return row


def _json(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}: not a list of objects; write [{{…}}, …], or JSON Lines")
    yield from found


def hub_rows(name: str, split: str, config: str = "") -> Iterator[Row]:
    """The rows of a hub repository (``owner/name``) or of a local folder in its layout, through ``datasets``.

    Raises:
        DataError: the hub cannot be reached, or has no such data set, configuration or split; one line.
    """
    import datasets  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    # It tells of each of its retries; the error below says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    shown = f"data set {name!r}" + (f" ({config})" if config else "")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises everything from ConnectionError to its own builders' errors
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{shown}, split {split!r}: cannot be loaded from the hub ({first[:200]}); {_MEND}") from None
    for batch in found.iter(batch_size=_BATCH):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
