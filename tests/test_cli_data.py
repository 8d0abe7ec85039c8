"""``retool data`` and ``retool cold-start`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool.cli import main
from retool.data.conversations import read_conversations
from retool.formats.tags import join, write_answer, write_code, write_output

PROMPT = "*user question:*\nWhat is 2+2?\nRemember to place the final answer in the last part using the format: X"
GOOD = join("I add.", write_code("print(2 + 2)"), write_output("4"), write_answer(r"\boxed{4}"))


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(response: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": response}]}


def test_the_list_names_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    for text in ("retool-sft", "JoeYing/ReTool-SFT", "dapo-math-17k", "1,791,700", "7,473 + 1,319", "--column"):
        assert text in shown


def test_preparing_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "a.jsonl", {"q": "What is 1+1?", "a": 2}, {"q": "what is $1+1$?", "a": "2"}, {"q": "", "a": 1}
    )
    out = tmp_path / "new" / "a.parquet"
    columns = ["--column", "question=q", "--column", "answer=a"]
    assert main(["data", "prepare", source, "--out", str(out), *columns]) == 0
    shown = capsys.readouterr().out
    assert "dropped: duplicate" in shown and "dropped: no question" in shown and str(out) in shown
    assert main(["data", "prepare", source, "--out", str(out), *columns, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["read"], report["kept"], report["dropped"]) == (3, 1, {"no question": 1, "duplicate": 1})
    assert main(["data", "show", str(out)]) == 0
    assert capsys.readouterr().out.startswith("── row 0\n[user] What is 1+1?\n[answer] 2\n")


def test_conversations_are_executed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "sft.jsonl", chat(GOOD), chat(GOOD.replace("\n4\n", "\n5\n", 1)), chat("no tags"))
    out = tmp_path / "sft.parquet"
    assert (
        main(["data", "prepare", "retool-sft", "--file", source, "--out", str(out), "--execute", "--timeout", "5"]) == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "dropped: no answer 1" in shown and "programs run again 2" in shown
    assert "programs whose output differs 1" in shown
    (difference,) = map(json.loads, (tmp_path / "sft.outputs.jsonl").read_text().splitlines())
    assert (difference["id"], difference["recorded"], difference["real"]) == ("retool-sft/1", "5", "4")
    assert len(list(read_conversations(out))) == 2
    assert main(["data", "show", str(out), "--first", "1", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("── row 1, retool-sft/1\n[system] ") and "    print(2 + 2)\n[tool] 5\n" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "prepare", "aime-2025"], "Missing option '--out'"),
        (["data", "prepare", "nothing", "--out", "o.parquet"], "data set 'nothing': unknown"),
        (["data", "prepare", "FILE", "--out", "o.csv"], "ends in .parquet"),
        (["data", "prepare", "FILE", "--out", "o.parquet", "--column", "q"], "--column 'q': write FIELD=COLUMN"),
        (["data", "prepare", "FILE", "--out", "o.parquet", "--execute"], "are for conversations"),
        (
            ["data", "prepare", "retool-sft", "--file", "FILE", "--out", "o.parquet", "--no-chinese", "--limit", "2"],
            "--no-chinese, --limit: for problems, and 'retool-sft' holds conversations",
        ),
        (
            ["data", "prepare", "FILE", "--out", "o.parquet", "--column", "id=a", "--column", "id=b"],
            "--column 'id=b': id has a column already",
        ),
        (["data", "prepare", "FILE", "--out", "o.parquet", "--against", "no"], "data set 'no': unknown"),
        (["data", "prepare", "FILE", "--out", "o.parquet", "--ngram", "1"], "Invalid value for '--ngram'"),
        (["data", "show", "none.parquet"], "no such file"),
        (["data", "show", "FILE", "--first", "9"], "has no row 9"),
        (["cold-start", "FILE", "--out", "o.parquet", "--teacher", "me", "--model", "m"], "--teacher 'me': give an"),
        (["cold-start", "FILE", "--out", "o.parquet", "--model", "m"], "Missing option '--teacher'"),
        (
            ["cold-start", "FILE", "--out", "o.parquet", "--teacher", "http://127.0.0.1:9/v1", "--model", "m",
             "--retries", "0"],
            "cannot be reached; start the server",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a.jsonl", {"question": "What is 1+1?", "answer": 2})
    assert main([source if a == "FILE" else a for a in arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1
    assert not list(tmp_path.glob("*.parquet"))


def test_a_terminal_does_not_obey_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", {"question": "A \x1b[2J\x1b]0;title\x07?\n\tB", "answer": "1\r2"})
    assert main(["data", "show", source]) == 0
    shown = capsys.readouterr().out
    assert "[question] A \\x1b[2J\\x1b]0;title\\x07?\n\tB" in shown and "[answer] 1\\r2" in shown
