"""What the jobs get of a recipe's data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retool.config import Recipe, make_recipe
from retool.data.conversations import Row, write_conversations
from retool.data.prompts import prompt_messages
from retool.data.sources import open_source
from retool.errors import ConfigError, DataError
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.types import Conversation

PROMPT = "*user question:*\nWhat is {0}+0?\nRemember to place the final answer in the last part using the format: X"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(format: str = "hermes", **data: Any) -> Recipe:
    return make_recipe({"data": data, "rollout": {"format": format}})


def problems(path: Path, count: int) -> str:
    return write(path, [{"question": f"What is {n}+0?", "answer": n} for n in range(count)])


def retool_sft(path: Path, count: int) -> str:
    def row(n: int) -> dict[str, Any]:
        said = join("I add.", write_code(f"print({n})"), write_output(str(n)), write_answer(rf"\boxed{{{n}}}"))
        return {"messages": [{"role": "user", "content": PROMPT.format(n)}, {"role": "assistant", "content": said}]}

    return write(path, [*map(row, range(count)), {"messages": []}])


def test_training_is_cleaned_and_an_evaluation_kept_out(tmp_path: Path) -> None:
    train = problems(tmp_path / "train.jsonl", 21)
    Path(train).write_text(Path(train).read_text() + json.dumps({"question": "求 x", "answer": "1"}) + "\n")
    exam = problems(tmp_path / "exam.jsonl", 1)
    source = open_source(recipe(train=train, test=exam, against=[exam], chinese=False))
    seen = {task.messages[-1]["content"] for task in source.train_tasks(0, 18)}
    dev = {task.messages[-1]["content"] for task in source.eval_tasks("dev", 99)}
    assert seen | dev == {f"What is {n}+0?" for n in range(1, 21)} and not seen & dev
    (task,) = source.eval_tasks("test", 99)
    assert (task.id, task.source, task.answer) == ("exam/0", "exam", "0")
    assert task.messages == prompt_messages("What is 0+0?")


def test_columns_are_those_of_ones_own_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "t.jsonl", [{"q": f"What is {n}+0?", "a": n} for n in (*range(4), 3)])
    exam = write(tmp_path / "e.jsonl", [{"problem": "What?", "answer": "1"}])
    columns = {"question": "q", "answer": "a"}
    source = open_source(recipe(train=train, columns=columns, test="aime-2025", test_file=exam))
    assert len(source.train_tasks(0, 3)) == 3
    assert [task.id for task in source.eval_tasks("test", 9)] == ["aime-2025/0"]
    assert "1 of 5 rows left out: 1 duplicate" in caplog.text


def test_a_known_set_and_its_local_files(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "<<1+1=2>>2 #### 2"}
    train = write(tmp_path / "train.jsonl", [row, {**row, "question": "And now?"}, {**row, "question": "Then?"}])
    test = write(tmp_path / "test.jsonl", [row])
    source = open_source(recipe(train="gsm8k", train_file=train, test_file=test))
    assert [task.id for task in source.eval_tasks("test", 9)] == ["gsm8k/test/0"]
    assert {task.id for task in source.train_tasks(0, 2)} <= {f"gsm8k/train/{n}" for n in range(3)}
    found, held = source.conversations(0)
    assert len(found) == 2 and len(held) == 1
    assert found[0].messages[2]["tool_calls"]


@pytest.mark.parametrize("format", ["hermes", "code_tags"])
def test_demonstrations_of_every_kind_end_as_the_format_wants(tmp_path: Path, format: str) -> None:
    row = {"question": "How many?", "answer": "So <<1+1=2>>2\n#### 2"}
    gsm8k = write(tmp_path / "g.jsonl", [{**row, "question": f"How many, {n}?"} for n in range(4)])
    prepared = tmp_path / "own.parquet"
    chat = [*prompt_messages("?"), {"role": "assistant", "content": r"It is \boxed{2}."}]
    write_conversations(prepared, [Row(Conversation(str(n), chat)) for n in range(4)])
    for data in (
        {"train": "gsm8k", "train_file": gsm8k},
        {"train": "retool-sft", "train_file": retool_sft(tmp_path / "r.jsonl", 4)},
        {"train": str(prepared)},
        {"train": "world"},
    ):
        found, held = open_source(recipe(format, **data)).conversations(20)
        assert found and held
        if data["train"] == "retool-sft":
            assert len(found) == 3 and all("<answer>" in c.messages[-1]["content"] for c in found)
            continue
        tagged = ["<answer>" in c.messages[-1]["content"] for c in found if c.tools]
        assert set(tagged) == {format == "code_tags"}


def test_one_string_with_tags_serves_a_format_with_calls(tmp_path: Path) -> None:
    """Nobody may learn to write the interpreter's lines."""
    said = join("I add.", write_code("print(1)"), write_output("1"), write_answer(r"\boxed{1}"))
    chats = [[*prompt_messages("?"), {"role": "assistant", "content": said}]] * 3
    write_conversations(tmp_path / "a.parquet", [Row(Conversation(str(n), chat)) for n, chat in enumerate(chats)])
    calls = open_source(recipe("hermes", train=str(tmp_path / "a.parquet"))).conversations(0)[0]
    assert [m["role"] for m in calls[0].messages] == ["system", "user", "assistant", "tool", "assistant"]
    string = open_source(recipe("code_tags", train=str(tmp_path / "a.parquet"))).conversations(0)[0]
    assert string[0].messages == chats[0]
    broken = [[*prompt_messages("?"), {"role": "assistant", "content": said.replace("</answer>", "")}]]
    write_conversations(tmp_path / "b.parquet", [Row(Conversation("b/7", broken[0]))] * 2)
    with pytest.raises(DataError, match="conversation 'b/7': unclosed <answer>"):
        open_source(recipe("hermes", train=str(tmp_path / "b.parquet"))).conversations(0)


@pytest.mark.parametrize(
    ("data", "asks", "says"),
    [
        ({"train": "dapo-math-17k"}, "conversations", "holds problems without demonstrations"),
        ({"train": "PROBLEMS"}, "test", "data.test is empty, and .* has no test split"),
        ({"train": "retool-sft", "train_file": "SFT"}, "train", "holds conversations, not problems"),
        ({"train": "nonsense"}, "train", "data set 'nonsense': unknown"),
        ({"train": "PROBLEMS", "columns": {"question": "zzz"}}, "train", "column 'zzz' is not there"),
        ({"train": "ONE"}, "train", "fewer than two problems"),
        ({"train": "PROBLEMS"}, "conversations", "no 'messages'"),
    ],
)
def test_a_set_that_does_not_serve_is_one_line(data: dict[str, Any], asks: str, says: str, tmp_path: Path) -> None:
    places = {"PROBLEMS": problems(tmp_path / "p.jsonl", 5), "SFT": retool_sft(tmp_path / "s.jsonl", 3),
              "ONE": problems(tmp_path / "one.jsonl", 1)}  # fmt: skip
    source = open_source(recipe(**{k: places.get(v, v) if isinstance(v, str) else v for k, v in data.items()}))
    asked = {
        "conversations": lambda: source.conversations(0),
        "test": lambda: source.eval_tasks("test", 1),
        "train": lambda: source.train_tasks(0, 1),
    }
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        asked[asks]()
    assert "\n" not in str(caught.value)
