"""``retool cold-start`` as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool.cli import main
from retool.data.conversations import read_conversations
from retool.data.problem import Problem
from retool.data.sets import load_problems
from retool.formats.tags import join, write_answer, write_code, write_output
from tests.data.cold_start.scripted import Say, serving
from tests.fakes import hear_ctrl_c


def good(n: int) -> str:
    return join("I add.", write_code(f"print({n} + 0)"), write_output(f"{n}"), write_answer(rf"\boxed{{{n}}}"))


def number_of(question: str) -> int:
    return int(question.split()[2])


def made(count: int, folder: Path) -> tuple[list[Problem], str]:
    path = folder / "problems.jsonl"
    rows = [{"question": f"What is {n} plus 0, problem {n}?", "answer": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_problems(str(path))), str(path)


def typed(source: str, url: str, out: Path, *more: str) -> list[str]:
    return ["cold-start", source, "--out", str(out), "--teacher", url, "--model", "m", "--timeout-code", "5", *more]


def test_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, source = made(4, tmp_path)
    out = tmp_path / "new" / "o.parquet"
    with serving(lambda q, n: Say(good(number_of(q) if number_of(q) else 9)), problems) as teacher:
        assert main(typed(source, teacher.url, out)) == 0
        shown = capsys.readouterr().out
        words = " ".join(shown.split())
        for text in ("problems 4", "kept 3", "rejected, answer: wrong 1", "tokens, answers 200", "runs by status ok 3"):
            assert text in words
        assert shown.splitlines()[-1] == (
            f"{out}  (to read: {out.with_suffix('')}.samples.md, the counts: {out.with_suffix('')}.report.json)"
        )
        assert main(typed(source, teacher.url, out, "--json")) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((tmp_path / "new" / "o.report.json").read_text())
        assert (report["kept"], report["requests"], report["left"]) == (3, 4, 0)
        assert main(typed(source, teacher.url, out, "--quiet")) == 0
        assert capsys.readouterr() == ("", "")
    assert len(list(read_conversations(out))) == 3


def test_a_budget_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, source = made(4, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, n: Say(good(number_of(q))), problems) as teacher:
        assert main(typed(source, teacher.url, out, "--max-requests", "3")) == 0
        shown = capsys.readouterr().out
        assert "The budget is spent: the same command with a larger one goes on." in shown
        assert "still to ask 1" in " ".join(shown.split())
        assert main(typed(source, teacher.url, out, "--max-requests", "4")) == 0
        assert "is spent" not in capsys.readouterr().out
        assert set(teacher.asked.values()) == {1}


def test_a_teacher_that_has_gone_is_not_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, source = made(60, tmp_path)
    with serving(lambda q, n: Say("oh\nno", status=503), problems) as teacher:
        assert main(typed(source, teacher.url, tmp_path / "o.parquet", "--retries", "0", "--concurrency", "1")) == 1
    shown = capsys.readouterr().out
    assert "The teacher gives no answers (HTTP 503: oh no): the same command goes on when it does." in shown
    assert "HTTP 503: the teacher said, for one: oh no" in shown
    assert "Nothing is kept, so no Parquet file is written." in shown
    assert sum(teacher.asked.values()) == 20


def test_the_key_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, source = made(1, tmp_path)
    out = tmp_path / "o.parquet"
    monkeypatch.setenv("MY_KEY", "s3cret\n")
    with serving(lambda q, n: Say("no", status=401) if n == 0 else Say(good(0)), problems) as teacher:
        assert main(typed(source, teacher.url, out, "--key-env", "MY_KEY")) == 2
        error = capsys.readouterr().err
        assert "refuses the key (401); set it in the variable of --key-env" in error and error.count("\n") == 1
        monkeypatch.delenv("MY_KEY")
        assert main(typed(source, teacher.url, out, "--key-env", "MY_KEY")) == 0
        assert teacher.authorizations == {"Bearer s3cret", "Bearer none"}
    assert "s3cret" not in error + "".join(f.read_text(errors="replace") for f in tmp_path.iterdir())


@pytest.mark.parametrize(("interrupt", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_the_answers_and_nothing_else(tmp_path: Path, interrupt: signal.Signals, code: int) -> None:
    problems, source = made(40, tmp_path)
    out = tmp_path / "o.parquet"
    slow = True

    def script(question: str, before: int) -> Say:
        return Say(good(number_of(question)), delay_s=60.0 if slow and number_of(question) >= 10 else 0.0)

    with serving(script, problems) as teacher:
        command = [sys.executable, "-m", "retool.cli", *typed(source, teacher.url, out, "--concurrency", "4")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=new_group
        )
        deadline = time.monotonic() + 60
        while sum(teacher.answered.values()) < 10 or teacher.running < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(interrupt)
        shown, error = process.communicate(timeout=60)
        assert (process.returncode, error.count("\n")) == (code, 1), error
        assert "stopped after" in shown
        with pytest.raises(ProcessLookupError):  # no process of its group is left
            os.killpg(process.pid, 0)
        assert not out.exists() and not list(tmp_path.glob(".*"))
        answered = [json.loads(line) for line in (tmp_path / "o.journal.jsonl").read_text().splitlines()[1:]]
        assert len(answered) == 10
        slow = False
        assert main(typed(source, teacher.url, out, "--quiet")) == 0
        asked = [teacher.asked[p.question] for p in problems]
        assert asked[:10] == [1] * 10 and sum(asked) <= 40 + 4
    assert len(list(read_conversations(out))) == 40


def new_group() -> None:
    os.setpgid(0, 0)
    hear_ctrl_c()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--teacher", "http://a:b@c/v1"], "--teacher holds a user or a password: put the secret where --key-env says"),
        (["--teacher", "http://a:99999/v1"], "--teacher 'http://a:99999/v1': give an address like"),
        (["--timeout-code", "-1"], "timeout_s"),
        (["--sandbox-url", "here"], "sandbox.url = 'here': give an address like"),
        (["--samples", "0"], "Invalid value for '--samples'"),
        (["--out", "o.csv"], "give a name that ends in .parquet"),
        (["--column", "answer=nothing"], "the column 'nothing' is not there"),
        (["--limit", "-1"], "Invalid value for '--limit'"),
        (["--against", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line(more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source = made(1, tmp_path)
    assert main(typed(source, "http://127.0.0.1:9/v1", tmp_path / "o.parquet", *more)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]
