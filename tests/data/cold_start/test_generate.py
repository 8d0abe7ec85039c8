"""The generator against a real HTTP server that scripts good, bad, slow and failing answers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Say, Script, serving

from retool.config import SandboxConfig
from retool.data import gsm8k
from retool.data.cold_start.generate import Job, generate
from retool.data.cold_start.report import ColdStartReport
from retool.data.cold_start.teacher import TeacherConfig
from retool.data.conversations import read_conversations, with_answer_tags
from retool.data.prepare import Cleaning
from retool.data.problem import Problem
from retool.data.retool_sft import to_text
from retool.data.sets import load_problems
from retool.errors import ConfigError
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.progress import Progress
from tests.fakes import hear_ctrl_c

QUIET = Progress(quiet=True)
QUICK = SandboxConfig(timeout_s=5, preload=["math"], workers=4)


def good(answer: str) -> str:
    return join(
        "I add.", write_code(f"print({answer} + 0)"), write_output(answer), write_answer(rf"\boxed{{{answer}}}")
    )


def made(count: int, folder: Path) -> tuple[list[Problem], Path]:
    path = folder / "problems.jsonl"
    rows = [{"question": f"What is {n} plus 0, problem {n}?", "answer": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_problems(str(path))), path


def run(path: Path, url: str, out: Path, **options: Any) -> ColdStartReport:
    teacher = TeacherConfig(
        url, "m", retries=options.pop("retries", 3), timeout_s=options.pop("timeout_s", 10.0),
        max_tokens=options.pop("max_tokens", 4096),
    )  # fmt: skip
    job = Job(str(path), out, teacher, sandbox=QUICK, **options)
    return asyncio.run(generate(job, QUIET))


def number_of(question: str) -> int:
    return int(question.split()[2])


def test_good_bad_slow_and_failing_answers(tmp_path: Path) -> None:
    problems, path = made(16, tmp_path)

    def script(question: str, before: int) -> Say:
        n = number_of(question)
        said = Say(good(str(n)))
        return {
            0: said,
            1: replace(said, delay_s=0.5),
            2: Say("slow down", status=429, headers={"Retry-After": "0.2"}) if before == 0 else said,
            3: Say("oh", status=500) if before < 2 else said,
            4: Say(reset=True) if before == 0 else said,
            5: Say(raw=b"{not json") if before == 0 else said,
            6: Say(raw=b'{"id": "c", "object": "chat.completion", "choices": []}') if before == 0 else said,
            7: replace(said, finish="length"),
            8: Say(good("99")),
            9: Say("It is nine."),
            10: Say("no such thing", status=400),
            11: Say("oh", status=503),
            12: Say(good("12").replace("print(12 + 0)", "print(13)")),
            13: Say(good("13").replace("print(13 + 0)", "1/0")),
            14: Say(""),
            15: replace(said, delay_s=3.0) if before == 0 else said,
        }[n]

    out = tmp_path / "o.parquet"
    with serving(script, problems) as teacher:
        report = run(path, teacher.url, out, timeout_s=1.5)
    assert report.kept == 8
    assert dict(report.rejected) == {
        "truncated": 1, "answer: wrong": 1, "format: no answer": 1, "execution: mismatch": 1, "execution: error": 1,
        "empty": 1,
    }  # fmt: skip
    assert dict(report.failed) == {"HTTP 400: no such thing": 1, "HTTP 503": 1}
    assert (report.wanted, report.answered, report.left) == (16, 14, 2)
    asked = [teacher.asked[p.question] for p in problems]
    assert asked == [1, 1, 2, 3, 2, 2, 2, 1, 1, 1, 1, 4, 1, 1, 1, 2]
    assert report.requests == sum(asked)
    assert report.prompt_tokens == 14 * 100 and report.completion_tokens == 14 * 50
    kept = list(read_conversations(out))
    assert [c.id for c in kept] == [f"problems/{n}" for n in (0, 1, 2, 3, 4, 5, 6, 15)]
    assert [m["role"] for m in kept[0].messages] == ["system", "user", "assistant", "tool", "assistant"]
    page = (tmp_path / "o.samples.md").read_text()
    assert "## Kept: problems/0" in page and "## Rejected, answer: wrong: problems/8" in page
    stored = json.loads((tmp_path / "o.report.json").read_text())
    assert stored["kept"] == 8 and stored["code"]["programs"] == 8 and stored["code"]["runs by status"] == {"ok": 8}


def test_the_next_start_asks_for_what_failed_and_for_nothing_else(tmp_path: Path) -> None:
    problems, path = made(6, tmp_path)
    out = tmp_path / "o.parquet"

    def script(question: str, before: int) -> Say:
        return Say("oh", status=503) if number_of(question) == 3 and before < 2 else Say(good(str(number_of(question))))

    with serving(script, problems) as teacher:
        first = run(path, teacher.url, out, retries=1)
        assert (first.kept, dict(first.failed), first.requests) == (5, {"HTTP 503": 1}, 7)
        second = run(path, teacher.url, out, retries=1)
        assert (second.kept, dict(second.failed), second.requests) == (6, {}, 8)
        third = run(path, teacher.url, out, retries=1)
        assert third.kept == 6 and third.requests == 8
        assert [teacher.asked[p.question] for p in problems] == [1, 1, 1, 3, 1, 1]


def test_requests_at_a_time_are_bounded(tmp_path: Path) -> None:
    problems, path = made(20, tmp_path)
    with serving(lambda q, _: Say(good(str(number_of(q))), delay_s=0.05), problems) as teacher:
        assert run(path, teacher.url, tmp_path / "o.parquet", concurrency=3).kept == 20
        assert teacher.most_running == 3


@pytest.mark.parametrize(
    ("budget", "answered"),
    [({"max_requests": 7}, 7), ({"max_total_tokens": 2000}, None), ({"max_total_tokens": 1}, 0)],
)
def test_a_budget_is_kept_and_a_larger_one_goes_on(
    tmp_path: Path, budget: dict[str, int], answered: int | None
) -> None:
    problems, path = made(12, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        report = run(path, teacher.url, out, max_tokens=100, **budget)
        assert report.budget_spent
        assert answered is None or report.answered == answered
        assert report.kept == report.answered < 12
        assert out.exists() is (report.kept > 0)
        if "max_total_tokens" in budget:
            assert report.prompt_tokens + report.completion_tokens <= budget["max_total_tokens"]
        rest = run(path, teacher.url, out, max_tokens=100)
        assert rest.kept == 12 and not rest.budget_spent
        assert set(teacher.asked.values()) == {1}


def test_requests_before_the_budget_was_spent_are_counted(tmp_path: Path) -> None:
    problems, path = made(3, tmp_path)
    out = tmp_path / "o.parquet"

    def script(question: str, before: int) -> Say:
        return Say("oh", status=503) if before == 0 else Say(good(str(number_of(question))))

    with serving(script, problems) as teacher:
        first = run(path, teacher.url, out, max_requests=4, concurrency=3)
        assert first.requests == 4 and first.budget_spent and first.answered == 1
        assert dict(first.failed) == {"the budget was spent": 2}
        last = run(path, teacher.url, out)
        assert last.requests == sum(teacher.asked.values()) == 6 and last.kept == 3


def test_several_samples_and_repeated_ones(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)

    def script(question: str, before: int) -> Say:
        text = good(str(number_of(question)))
        return Say(text if before != 1 else text.replace("I add.", "I sum."))

    with serving(script, problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet", samples=3, concurrency=1)
    assert report.kept == 4 and dict(report.rejected) == {"the same as an earlier sample": 2}
    assert [c.id for c in read_conversations(tmp_path / "o.parquet")] == [
        f"problems/{p}/{s}" for p in (0, 1) for s in (0, 1)
    ]


def test_tags_as_one_string(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    with serving(lambda q, _: Say(good("0")), problems) as teacher:
        run(path, teacher.url, tmp_path / "o.parquet", form="tags")
    (found,) = read_conversations(tmp_path / "o.parquet")
    assert found.messages[-1] == {"role": "assistant", "content": good("0")}


def test_duplicates_and_evaluation_problems_are_not_asked_about(tmp_path: Path) -> None:
    problems, path = made(4, tmp_path)
    path.write_text(path.read_text() + path.read_text())
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": problems[2].question.upper(), "answer": "2"}) + "\n")
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet", cleaning=Cleaning(against=[str(exam)]))
        assert sum(teacher.asked.values()) == report.kept == 3
    assert report.cleaning["dropped"] == {"duplicate": 4, "contaminated": 1}


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (Say("bad key", status=401), "refuses the key .401.; set it as --key-env says"),
        (Say("no model m", status=404), "--model 'm': .* answers 404 .*no model m"),
    ],
)
def test_what_can_never_succeed_ends_the_run_in_one_line(tmp_path: Path, said: Say, says: str) -> None:
    problems, path = made(30, tmp_path)
    with serving(lambda q, n: said, problems) as teacher:
        with pytest.raises(ConfigError, match=says) as caught:
            run(path, teacher.url, tmp_path / "o.parquet")
        assert sum(teacher.asked.values()) <= 16
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    _, path = made(3, tmp_path)
    with pytest.raises(ConfigError, match="cannot be reached; start the server, or mend the address"):
        run(path, "http://127.0.0.1:9/v1", tmp_path / "o.parquet", retries=0)


def test_answers_to_different_questions_are_not_mixed(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        run(path, teacher.url, out)
        job = Job(str(path), out, TeacherConfig(teacher.url, "other"), sandbox=QUICK)
        with pytest.raises(ConfigError, match=r"--model = 'other': .* was begun with 'm'; give that, another --out"):
            asyncio.run(generate(job, QUIET))
        assert asyncio.run(generate(replace(job, restart=True), QUIET)).kept == 2
        assert set(teacher.asked.values()) == {2}


def test_the_key_is_sent_and_nowhere_else(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    with serving(lambda q, _: Say(good("0")), problems) as teacher:
        job = Job(str(path), tmp_path / "o.parquet", TeacherConfig(teacher.url, "m", key="s3cret"), sandbox=QUICK)
        asyncio.run(generate(job, QUIET))
        assert teacher.authorizations == {"Bearer s3cret"}
        (body,) = teacher.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 4096)
    for written in tmp_path.iterdir():
        assert b"s3cret" not in written.read_bytes()


# Two hundred problems of GSM8K


def lessons(shared_data: Path, folder: Path) -> tuple[list[Problem], dict[str, str], Path]:
    """The first 200 problems whose annotated solutions give a program, and a right answer with tags for each."""
    file = str(shared_data / "math" / "gsm8k_train.jsonl")
    problems = list(load_problems("gsm8k", file=file))[:260]
    by_id = {problem.id: problem for problem in problems}
    conversations = gsm8k.convert(problems)[0][:200]
    chosen = [by_id[c.id] for c in conversations]
    texts = {p.question: to_text(with_answer_tags(c).messages[2:]) for p, c in zip(chosen, conversations, strict=True)}
    path = folder / "chosen.jsonl"
    rows = [{"question": p.question, "answer": p.answer, "solution": p.solution} for p in chosen]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return chosen, texts, path


def scripted(chosen: list[Problem], texts: dict[str, str]) -> tuple[Script, dict[str, int]]:
    """Tenths: a reaction for each number modulo 10, and the counts that must come of them."""
    place = {p.question: n for n, p in enumerate(chosen)}

    def script(question: str, before: int) -> Say:
        right = texts[question]
        printed = right[right.index("<interpreter>\n") + len("<interpreter>\n") : right.index("\n</interpreter>")]
        return {
            0: Say(right[: right.rindex("\\boxed{")] + "\\boxed{-77}\n</answer>"),
            1: Say(right.replace("</code>", "", 1)),
            2: Say("In the head.\n\n" + right[right.index("<answer>") :]),
            3: Say(right.replace(f"\n{printed}\n", "\n987654\n", 1).replace("<answer>", "So 987654.\n<answer>")),
            4: Say(right.replace(f"\n{printed}\n", f"\n{printed}\ntook 31337 ns\n", 1)),
            5: Say(right.replace("```python\n", "```python\nimport no_such_module_at_all\n", 1)),
            6: Say(right, finish="length"),
            7: Say("busy", status=429, headers={"Retry-After": "0.01"}) if before == 0 else Say(right),
            8: Say("oh", status=500) if before == 0 else Say(right),
            9: Say(right, delay_s=0.02),
        }[place[question] % 10]

    rejected = {"answer: wrong": 20, "format: unclosed <code>": 20, "format: no code": 20, "execution: mismatch": 20,
                "execution: error": 20, "truncated": 20}  # fmt: skip
    return script, rejected


def test_two_hundred_problems_are_counted_as_scripted(shared_data: Path, tmp_path: Path) -> None:
    chosen, texts, path = lessons(shared_data, tmp_path)
    script, rejected = scripted(chosen, texts)
    with serving(script, chosen) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet")
    assert dict(report.rejected) == rejected
    assert report.kept == 80 and report.answered == 200 and not report.failed
    assert report.code["outputs replaced"] == 20
    assert report.requests == 240
    for conversation in read_conversations(tmp_path / "o.parquet"):
        question = conversation.messages[1]["content"]
        assert to_text(conversation.messages[2:]).partition("took")[0].startswith(texts[question][:40])


def test_killed_at_random_moments_it_asks_for_nothing_twice_and_loses_nothing(
    shared_data: Path, tmp_path: Path
) -> None:
    """SIGKILL, again and again. Whatever answer reached the journal is never asked for again; of the requests that were
    under way at a kill the server cannot know whether they arrived, and those alone may be sent once more."""
    chosen, texts, path = lessons(shared_data, tmp_path)
    journal = tmp_path / "o.journal.jsonl"
    concurrency, kills = 8, 0
    rng = random.Random(time.time_ns())
    with serving(lambda q, _: Say(texts[q], delay_s=0.03), chosen) as teacher:
        command = [
            sys.executable, "-m", "retool.cli", "cold-start", str(path), "--out", str(tmp_path / "o.parquet"),
            "--teacher", teacher.url, "--model", "m", "--concurrency", str(concurrency), "--timeout-code", "5", "-q",
        ]  # fmt: skip
        while True:
            before = dict(teacher.asked)
            known = (
                {json.loads(line)["id"] for line in journal.read_bytes().split(b"\n")[1:-1]}
                if journal.exists()
                else set()
            )
            process = subprocess.Popen(command, preexec_fn=hear_ctrl_c, env={**os.environ, "PYTHONFAULTHANDLER": "1"})
            if kills < 3:
                while sum(teacher.asked.values()) == sum(before.values()) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0.0, 0.4))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() != 0
            assert process.wait() in (0, -signal.SIGKILL)
            again = {
                f"chosen/{n}" for n, p in enumerate(chosen) if teacher.asked[p.question] > before.get(p.question, 0)
            }
            assert not again & known, "an answer that is on the disk was asked for again"
            if process.returncode == 0:
                break
    assert sum(teacher.asked.values()) <= 200 + kills * concurrency
    assert len(list(read_conversations(tmp_path / "o.parquet"))) == 200
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert report["kept"] == report["answered"] == 200
