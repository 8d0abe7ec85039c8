"""ReTool-SFT as a file of conversations; outputs compared with a real run; conversations in files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedSandbox
from test_retool_sft import ASKED, BROKEN, GOOD, PROMPT, row

from retool.data.conversations import Row, read_conversations, with_answer_tags, write_conversations
from retool.data.conversion import prepare_conversations, run_again, write_differences
from retool.data.outputs import changes_reasoning, same_output
from retool.data.prepare import Cleaning
from retool.data.retool_sft import convert
from retool.errors import DataError
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.types import Conversation, ExecutionResult, ExecutionStatus

TWICE = join(
    write_code("print(4)"), write_output("4"), write_code("1/0"), write_output("Boom"), write_answer(r"\boxed{4}")
)


def write_rows(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    return path


def test_every_broken_row_is_reported_with_its_number_and_reason(tmp_path: Path) -> None:
    broken = [(reason, bad) for reason, bad in BROKEN if isinstance(bad, dict)]
    assert len({reason for reason, _ in broken}) >= 20
    source = write_rows(tmp_path / "rows.jsonl", [row(), *(bad for _, bad in broken), row(TWICE)])
    out = tmp_path / "sft.parquet"
    report, found = prepare_conversations("retool-sft", out, file=str(source))
    assert [id for id, _ in found] == ["retool-sft/0", f"retool-sft/{len(broken) + 1}"]
    assert (report.read, report.kept) == (len(broken) + 2, 2)
    listed = [json.loads(line) for line in (tmp_path / "sft.dropped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [(n, r) for n, (r, _) in enumerate(broken, start=1)]
    assert report.notes == {"programs": 3, "rows without a program": 0}


@pytest.mark.parametrize("form", ["messages", "tags"])
def test_what_is_written_is_read(tmp_path: Path, form: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row(), row(TWICE)])
    out = tmp_path / "sft.parquet"
    prepare_conversations("retool-sft", out, file=str(source), form=form)
    expected = [convert(row()).messages(form), convert(row(TWICE)).messages(form)]
    assert [c.messages for c in read_conversations(out)] == expected
    assert pq.read_table(out, columns=["answer", "source"]).to_pylist() == [{"answer": "4", "source": "retool-sft"}] * 2


def test_the_hub_gives_the_same_rows(tmp_path: Path) -> None:
    found = [row(), row(TWICE)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    places = [tmp_path / "hub", write_rows(tmp_path / "rows.jsonl", found)]
    first, second = (prepare_conversations("retool-sft", tmp_path / "o.parquet", file=str(p))[1] for p in places)
    assert first == second


def test_questions_of_an_evaluation_are_left_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row(), row(prompt=PROMPT.format("What is 3+3?"))])
    exam = write_rows(tmp_path / "exam.jsonl", [{"question": "what is $2+2$?", "answer": "4"}])
    report, _ = prepare_conversations(
        "retool-sft", tmp_path / "o.parquet", file=str(source), wanted=Cleaning(against=[str(exam)])
    )
    assert dict(report.dropped) == {"contaminated": 1} and report.rows[0]["row"] == 0


def test_nothing_is_written_where_no_row_converts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row("no tags")])
    with pytest.raises(DataError, match="none of 1 rows converts"):
        prepare_conversations("retool-sft", tmp_path / "o.parquet", file=str(source))
    assert not (tmp_path / "o.parquet").exists()


def test_an_output_that_would_replace_an_input_or_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row()])
    exam = tmp_path / "exam.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "What?", "answer": "4"}]), exam)
    with pytest.raises(DataError, match="is the input itself"):
        prepare_conversations("retool-sft", exam, file=str(source), wanted=Cleaning(against=[str(exam)]))
    (tmp_path / ".o.parquet.aside").mkdir()  # where the file is written first
    with pytest.raises(DataError, match="cannot be written") as caught:
        prepare_conversations("retool-sft", tmp_path / "o.parquet", file=str(source))
    assert "\n" not in str(caught.value)


def test_programs_are_run_again_and_differences_listed(tmp_path: Path) -> None:
    rows = [("a/0", convert(row())), ("a/1", convert(row(TWICE)))]
    lost = ExecutionResult(ExecutionStatus.INFRA)
    failed = ExecutionResult(ExecutionStatus.ERROR, stderr="ZeroDivisionError")
    sandbox = ScriptedSandbox(lambda code, count: failed if "/" in code else "4\n" if count else lost)
    differences = asyncio.run(run_again(rows, sandbox, 1.0))
    assert [(d["id"], d["program"], d["status"]) for d in differences] == [("a/0", 0, "infra"), ("a/1", 1, "error")]
    assert (differences[1]["recorded"], differences[1]["real"]) == ("Boom", "ZeroDivisionError")
    source = write_rows(tmp_path / "rows.jsonl", [row(), row(TWICE)])
    out = tmp_path / "o.parquet"
    report, _ = prepare_conversations("retool-sft", out, file=str(source))
    write_differences(out, report, 3, differences)
    notes = json.loads((tmp_path / "o.report.json").read_text())["notes"]
    assert (notes["programs run again"], notes["programs whose output differs"]) == (3, 1)
    assert notes["programs that the sandbox lost"] == 1
    assert len((tmp_path / "o.outputs.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("written", "real", "same"),
    [
        ("4", "4\n", True),
        ("[1,2]", "[1, 2]", True),
        ("0.3333", "0.3333333333333333", True),
        ("1.41", "1.4142135", True),
        ("3.0000000000000004", "3.0", True),
        ("1e-05", "0.00001", True),
        ("4", "5", False),
        ("4", "4.0", True),
        ("1000000", "1000001", False),
        ("0.33", "0.34", False),
        ("-4", "4", False),
        ("True", "False", False),
        ("{1, 2}", "{2, 1}", False),
        ("", "", True),
        ("4", "", False),
        ("4 5", "45", False),
        ("x1", "x2", False),
        (
            "Traceback (most recent call last):\n  File \"a.py\", line 3\nNameError: name 'x' is not defined",
            "Traceback (most recent call last):\n  File \"/w/b.py\", line 1\nNameError: name 'x' is not defined",
            True,
        ),
    ],
)
def test_outputs_are_compared_by_what_they_say(written: str, real: str, same: bool) -> None:
    assert same_output(written, real) is same
    assert same_output(real, written) is same


@pytest.mark.parametrize(
    ("written", "real", "after", "changes"),
    [
        ("time: 0.12 s, sum 42", "time: 0.31 s, sum 42", "The sum is 42.", False),
        ("42", "43", "So it is 42.", True),
        ("42", "43", "So it is done.", False),
        ("prime", "composite", "It is prime.", True),
        ("0.3333", "0.333333333", "About 0.3333.", False),
        ("a 7", "", "Nothing of it.", False),
    ],
)
def test_a_difference_matters_where_the_text_leans_on_it(written: str, real: str, after: str, changes: bool) -> None:
    assert changes_reasoning(written, real, after) is changes


def test_conversations_survive_their_file(tmp_path: Path) -> None:
    messages = [
        *convert(row(TWICE)).messages(),
        {"role": "user", "content": "é?"},
        {"role": "assistant", "content": ""},
    ]
    rows = [
        Row(Conversation("a", messages, tools=False), "s", "4"),
        Row(Conversation("b", messages[:3] + messages[-1:])),
    ]
    write_conversations(tmp_path / "new" / "c.parquet", rows)
    assert list(read_conversations(tmp_path / "new" / "c.parquet")) == [r.conversation for r in rows]


def test_files_of_other_making(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": '{"code": "print(1)"}'}}
    chat = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"}, {"role": "assistant", "content": "1"}]  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat, "tools": [{"type": "function"}]}])
    (found,) = read_conversations(path)
    assert (found.id, found.tools) == ("0", True)
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"code": "print(1)"}
    assert found.messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "no 'messages'"),
        ([], "no 'messages'"),
        ([{"role": "user", "content": "?"}], "must begin .* and end"),
        ([{"role": "robot", "content": "?"}], "role 'robot'"),
        ([{"role": "user", "content": 5}], "no string"),
        (
            [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": {}}]}],
            "without the arg",
        ),
    ],
)
def test_a_row_that_is_no_chat_is_one_line(tmp_path: Path, messages: Any, says: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=says) as caught:
        list(read_conversations(path))
    assert str(caught.value).startswith(f"{path}, row 0: ")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (r"The answer is \boxed{4}.", r"<answer>\n\boxed{4}\n</answer>"),
        ("I count.\n\\boxed{4}", r"I count.\n\n<answer>\n\boxed{4}\n</answer>"),
        (r"So 2+2 = \boxed{4} as said.", r"So 2+2 = \boxed{4} as said.\n\n<answer>\n\boxed{4}\n</answer>"),
        ("No box.", "No box."),
        (GOOD, GOOD),
    ],
)
def test_the_last_turn_gets_its_answer_tags(said: str, expected: str) -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    expected = expected.replace(r"\n", "\n")
    assert with_answer_tags(Conversation("a", chat)).messages[-1]["content"] == expected
    assert with_answer_tags(Conversation("a", chat, tools=False)).messages == chat
