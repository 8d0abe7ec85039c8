"""How the teacher is asked: what it may answer, what an answer costs, and when it is left alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from scripted import Say, serving
from test_generate import QUICK, QUIET, good, made, number_of, run

from retool.data.cold_start.generate import GIVE_UP, Job, generate
from retool.data.cold_start.teacher import CHARS_PER_TOKEN, Budget, Spent, Teacher, TeacherConfig, told_wait
from retool.errors import ConfigError


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("0.5", 0.5), ("", 0), ("-3", 0), ("soon", 0), ("nan", 0), ("inf", 0), ("²", 0), ("1e9", 3600)],
)
def test_a_wait_that_the_server_asks_for(header: str, seconds: float) -> None:
    assert told_wait(header, datetime.now(UTC)) == seconds


def test_a_wait_as_a_date() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert told_wait(format_datetime(now + timedelta(seconds=7), usegmt=True), now) == 7
    assert told_wait(format_datetime(now - timedelta(seconds=7), usegmt=True), now) == 0


@pytest.mark.parametrize(
    ("url", "key", "says"),
    [
        ("127.0.0.1:8000/v1", "", "--teacher '127.0.0.1:8000/v1': give an address like"),
        ("http://", "", "give an address like"),
        ("http://[::1/v1", "", "give an address like"),
        ("http://a:99999/v1", "", "give an address like"),
        ("http://me:s3cret@a/v1", "", "--teacher holds a user or a password"),
        ("http://a/v1", "s3cret\r\nX: y", "the key in --key-env holds characters"),
        ("http://a/v1", "s3crét", "the key in --key-env holds characters"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_used_is_one_line(url: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TeacherConfig(url, "m", key)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "s3cr" not in str(caught.value)


def test_a_key_that_the_server_quotes_is_not_written_down(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    with serving(lambda q, n: Say("Your key s3cret is of no use", status=400), problems) as teacher:
        job = Job(str(path), tmp_path / "o.parquet", TeacherConfig(teacher.url, "m", key="s3cret"), sandbox=QUICK)
        assert dict(generate(job, QUIET).failed) == {"HTTP 400": 1}
    written = (tmp_path / "o.journal.jsonl").read_text()
    assert "Your key … is of no use" in written and "s3cret" not in written


def test_a_server_that_drips_is_not_waited_for(tmp_path: Path) -> None:
    """Each of its bytes comes in time; the answer does not."""
    problems, path = made(2, tmp_path)

    def script(question: str, before: int) -> Say:
        return Say(raw=b" " * 1000, drip_s=0.1) if number_of(question) else Say(good("0"))

    with serving(script, problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet", timeout_s=0.7, retries=0)
    assert (report.kept, dict(report.failed)) == (1, {"no answer within 0.7 s": 1})


def test_tokens_of_completions_without_an_answer_are_spent(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    body = {"id": "c", "object": "chat.completion", "choices": [],
            "usage": {"prompt_tokens": 30, "completion_tokens": 3, "total_tokens": 33}}  # fmt: skip
    empty = Say(raw=json.dumps(body).encode())
    with serving(lambda q, n: empty if n < 3 else Say(good("0")), problems) as teacher:
        first = run(path, teacher.url, tmp_path / "o.parquet", retries=1)
        assert (first.lost_tokens, dict(first.failed)) == (66, {"no completion in the answer": 1})
        second = run(path, teacher.url, tmp_path / "o.parquet", retries=1)
        assert (second.lost_tokens, second.requests, second.kept) == (99, 4, 1)
        assert run(path, teacher.url, tmp_path / "o.parquet").lost_tokens == 99


def test_tokens_that_are_not_counted_are_guessed(tmp_path: Path) -> None:
    problems, path = made(12, tmp_path)
    with serving(lambda q, n: Say(good(str(number_of(q))), usage=False), problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet", max_tokens=100, max_total_tokens=10_000)
        longest = max(sum(len(m["content"]) for m in body["messages"]) for body in teacher.bodies)
    assert report.guessed == report.kept > 0 and report.budget_spent
    assert report.prompt_tokens <= report.kept * (longest // CHARS_PER_TOKEN) <= 10_000
    assert report.completion_tokens >= report.kept * (len(good("0")) // CHARS_PER_TOKEN)


def test_a_teacher_that_has_gone_is_left_alone(tmp_path: Path) -> None:
    problems, path = made(80, tmp_path)
    out = tmp_path / "o.parquet"
    gone = True

    def script(question: str, before: int) -> Say:
        n = number_of(question)
        return Say(good(str(n))) if n < 5 or not gone else Say("out of credit", status=429)

    with serving(script, problems) as teacher:
        report = run(path, teacher.url, out, retries=0, concurrency=2)
        assert report.given_up == "HTTP 429: out of credit" and report.kept == 5
        assert dict(report.failed) == {"HTTP 429": report.requests - 5}
        assert 5 + GIVE_UP <= report.requests < 5 + GIVE_UP + 2
        gone = False
        rest = run(path, teacher.url, out, retries=0)
        assert rest.kept == 80 and not rest.given_up and not rest.failed
        assert sum(teacher.asked.values()) == rest.requests == 80 + report.requests - 5


def test_a_few_failures_between_answers_stop_nothing(tmp_path: Path) -> None:
    problems, path = made(120, tmp_path)

    def script(question: str, before: int) -> Say:
        n = number_of(question)
        return Say("too long", status=400) if n % 3 else Say(good(str(n)))

    with serving(script, problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet", concurrency=4)
    assert (report.kept, dict(report.failed), report.given_up) == (40, {"HTTP 400": 80}, "")


def test_a_limit_may_have_another_name(tmp_path: Path) -> None:
    """As OpenAI's reasoning models want it; most other servers know the older name alone."""
    problems, path = made(20, tmp_path)
    with serving(lambda q, n: Say(good(str(number_of(q)))), problems) as teacher:
        teacher.refuses = "max_tokens"
        report = run(path, teacher.url, tmp_path / "o.parquet", concurrency=4, max_tokens=77)
        assert report.kept == 20 and report.requests <= 24
        assert all(body["max_completion_tokens"] == 77 for body in teacher.bodies if "max_tokens" not in body)


def test_a_misspelt_model_can_be_mended_by_the_next_command(tmp_path: Path) -> None:
    problems, path = made(3, tmp_path)
    known = "right"
    with serving(lambda q, n: Say(good(str(number_of(q)))), problems) as teacher:
        teacher.models = {known}
        job = Job(str(path), tmp_path / "o.parquet", TeacherConfig(teacher.url, "rihgt"), sandbox=QUICK)
        with pytest.raises(ConfigError, match=r"--model 'rihgt': .* answers 404 .*no model rihgt.*; mend the name or"):
            generate(job, QUIET)
        assert not job.out.exists()
        assert generate(replace(job, teacher=TeacherConfig(teacher.url, known)), QUIET).kept == 3


def test_requests_that_are_cancelled_leave_no_task() -> None:
    """As Ctrl-C does it inside the loop: nothing goes on behind the caller's back."""
    with serving(lambda q, n: Say(good("0"), delay_s=30), []) as teacher:

        async def cancelled() -> set[asyncio.Task[object]]:
            asked = Teacher(TeacherConfig(teacher.url, "m"), Budget(tokens=10**6))
            tasks = [asyncio.create_task(asked.ask([{"role": "user", "content": "?"}], Spent())) for _ in range(3)]
            while teacher.running < 3:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ended)
            await asked.close()
            return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]

        assert asyncio.run(cancelled()) == set()
