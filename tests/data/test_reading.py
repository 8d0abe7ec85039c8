"""Files that are broken in ways that only their content shows, and the hub's layout through ``datasets``."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.data.reading import hub_rows, rows
from retool.errors import DataError

CONFIGS = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
- config_name: other
  data_files:
  - split: train
    path: other/train-*
---
"""


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), path)
    return path


def test_a_gzip_file_that_breaks_inside_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"question": "A?", "answer": "1"}\n' * 5000)
    for content in (whole[:40] + b"\xff\xff\xff\xff" + whole[44:], whole[: len(whole) // 2]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read") as caught:
            list(rows(tmp_path / "a.jsonl.gz"))
        assert "\n" not in str(caught.value)


def test_a_parquet_file_whose_text_is_none_is_one_line(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"question": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no whole Parquet file") as caught:
        list(rows(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)


def test_a_folder_with_several_configurations_gives_the_one_asked_for(tmp_path: Path) -> None:
    """As ``openai/gsm8k`` is cloned: its rows must not be mixed with those of the other configuration."""
    for config in ("main", "other"):
        write(tmp_path / "hub" / config / "train-00000-of-00001.parquet", [{"a": config}])
    (tmp_path / "hub" / "README.md").write_text(CONFIGS)
    assert list(hub_rows(str(tmp_path / "hub"), "train", "main")) == [{"a": "main"}]
    with pytest.raises(DataError, match="cannot be loaded as a folder") as caught:
        list(hub_rows(str(tmp_path / "hub"), "train"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_configuration_is_read_as_it_is(tmp_path: Path) -> None:
    found = [{"a": n} for n in range(9)]
    write(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", found[:5])
    write(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", found[5:])
    assert list(hub_rows(str(tmp_path / "hub"), "train", "main")) == found
    with pytest.raises(DataError, match=r"split 'test': .* has the splits train"):
        list(hub_rows(str(tmp_path / "hub"), "test"))


def test_a_folder_of_another_kind_goes_through_datasets_own_reader(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    found = [{"a": "é", "b": 1}, {"a": "步", "b": 2}]
    (tmp_path / "hub" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert list(hub_rows(str(tmp_path / "hub"), "test")) == found


def test_parquet_in_a_folder_is_read_without_a_copy(tmp_path: Path) -> None:
    """The Arrow copy of ``datasets`` is mapped into memory whole: 2.4 GB for DAPO-Math-17k as published. Its builder
    would speak of a broken file in its own words."""
    path = write(tmp_path / "hub" / "train.parquet", [{"a": 1}])
    assert list(hub_rows(str(tmp_path / "hub"), "train")) == [{"a": 1}]
    path.write_bytes(b"PAR1, and then nothing")
    with pytest.raises(DataError, match="no whole Parquet file"):
        list(hub_rows(str(tmp_path / "hub"), "train"))
