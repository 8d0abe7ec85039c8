from __future__ import annotations

import json
import shutil
from pathlib import Path

import jinja2
import pytest
from fakes import tiny_tokenizer

from retool.errors import ConfigError
from retool.formats.calls import TOOL_SCHEMA, tool_call
from retool.formats.hermes import HermesFormat
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


def test_qwens_own_template_is_the_one_beside_it(shared_data: Path) -> None:
    """The template inside tokenizer_config.json and the .jinja file, with tools, calls and results; the .jinja by
    jinja2 itself, so that nothing of ours or of transformers' stands between."""
    folder = shared_data / "tokenizer" / "qwen2.5"
    tokenizer = load_tokenizer(folder)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    calls = [tool_call("print('é')\n"), tool_call("1/0")]
    chat = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "I run it.", "tool_calls": calls},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "<Error>"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Sure?"},
    ]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        for tools in ([TOOL_SCHEMA], None):
            expected = template.render(messages=messages, tools=tools, add_generation_prompt=True)
            found = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
            assert found == expected
            assert ("<tools>" in expected) is (tools is not None)
            prompt = HermesFormat(tokenizer).prompt_ids(messages, tools=tools is not None)
            assert tokenizer.decode(prompt) == expected
