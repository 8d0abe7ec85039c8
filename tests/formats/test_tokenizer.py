from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fakes import tiny_tokenizer

from retool.errors import ConfigError
from retool.formats.tokenizer import load_tokenizer


def test_qwen_gives_the_golden_vectors_from_vocab_and_merges(shared_data: Path) -> None:
    folder = shared_data / "tokenizer" / "qwen2.5"
    tokenizer = load_tokenizer(folder)
    rows = [json.loads(line) for line in (folder / "golden_vectors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24
    for row in rows:
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
    assert tokenizer.encode("<|im_start|><tool_call></tool_call><|im_end|>") == [151644, 151657, 151658, 151645]
    assert tokenizer.eos_token_id == 151645
    assert tokenizer.chat_template


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "é<|im_end|>\n<tool_call>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("vocab.json", "has no vocabulary"),
        ("merges.txt", "has no vocabulary"),
        ("tokenizer_config.json", "cannot be loaded"),
    ],
)
def test_a_folder_without_its_files_is_one_line(shared_data: Path, tmp_path: Path, missing: str, says: str) -> None:
    for name in {"vocab.json", "merges.txt", "tokenizer_config.json"} - {missing}:
        shutil.copy(shared_data / "tokenizer" / "qwen2.5" / name, tmp_path)
    with pytest.raises(ConfigError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is a file"):
        load_tokenizer(path)
