"""The generator against a real HTTP server that scripts good, bad, slow and failing answers."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Say, serving

from retool.config import SandboxConfig
from retool.data.cold_start.generate import Job, generate
from retool.data.cold_start.report import ColdStartReport
from retool.data.cold_start.teacher import TeacherConfig
from retool.data.conversations import read_conversations
from retool.data.prepare import Cleaning
from retool.data.problem import Problem
from retool.data.sets import load_problems
from retool.errors import ConfigError
from retool.formats.tags import join, write_answer, write_code, write_output
from retool.progress import Progress
from tests.sandbox.served import ServedFake, done, infra_result, service

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
    return generate(job, QUIET)


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
    assert dict(report.failed) == {"HTTP 400": 1, "HTTP 503": 1}
    assert report.said == {"HTTP 400": "no such thing", "HTTP 503": "oh"}
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
        (Say("bad key", status=401), "wants a key, and none is set .401.; set it in the variable of --key-env"),
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
            generate(job, QUIET)
        assert generate(replace(job, restart=True), QUIET).kept == 2
        assert set(teacher.asked.values()) == {2}


def rewrite(path: Path, *rows: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_answer_serves_the_problem_that_was_asked_alone(tmp_path: Path) -> None:
    """Another file may give the same id to another problem; the first one's answers are kept for it."""
    problems, path = made(2, tmp_path)
    before = path.read_text()
    other = [{"question": f"What is {n} plus 0, said otherwise?", "answer": str(n)} for n in range(2)]
    with serving(lambda q, _: Say(good(str(number_of(q)))), [*problems, *(
        Problem("", "", row["question"], row["answer"]) for row in other
    )]) as teacher:  # fmt: skip
        out = tmp_path / "o.parquet"
        assert run(path, teacher.url, out).requests == 2
        rewrite(path, *other)
        assert run(path, teacher.url, out).requests == 4
        assert "otherwise" in next(read_conversations(out)).messages[1]["content"]
        path.write_text(before)
        again = run(path, teacher.url, out)
        assert again.requests == 4 and again.kept == 2
        assert set(teacher.asked.values()) == {1}
        assert "problem 0" in next(read_conversations(out)).messages[1]["content"]


def test_another_truth_is_another_verdict_without_another_question(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        assert run(path, teacher.url, out).kept == 2
        rewrite(
            path, {"question": problems[0].question, "answer": "0"}, {"question": problems[1].question, "answer": "7"}
        )
        report = run(path, teacher.url, out)
        assert (report.kept, dict(report.rejected), report.requests) == (1, {"answer: wrong": 1}, 2)


def test_checks_with_other_settings_are_made_again(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    out = tmp_path / "o.parquet"
    textual = join("It is nothing.", write_answer(r"\boxed{0}"))

    def script(question: str, before: int) -> Say:
        return Say(textual if number_of(question) == 0 else good("1"))

    with serving(script, problems) as teacher:
        first = run(path, teacher.url, out)
        assert (first.kept, dict(first.rejected)) == (1, {"format: no code": 1})
        assert run(path, teacher.url, out, textual=True).kept == 2
        assert run(path, teacher.url, out).kept == 1
        assert set(teacher.asked.values()) == {1}


def test_what_is_complete_needs_no_teacher(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        run(path, teacher.url, out)
    whole = out.read_bytes()
    out.unlink()
    report = run(path, "http://127.0.0.1:9/v1", out, form="messages")
    assert report.kept == 2 and out.read_bytes() == whole


def test_verdicts_that_are_lost_are_made_again(tmp_path: Path) -> None:
    problems, path = made(3, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher:
        run(path, teacher.url, out)
        for content in (b"", b"PAR1\n", (tmp_path / "o.checked.jsonl").read_bytes()[:-9]):
            (tmp_path / "o.checked.jsonl").write_bytes(content)
            assert run(path, teacher.url, out).kept == 3
        assert set(teacher.asked.values()) == {1}


def test_rows_of_an_earlier_run_do_not_stay_when_none_is_kept(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    out = tmp_path / "o.parquet"
    with serving(lambda q, n: Say(good("0") if n == 0 else "no"), problems) as teacher:
        assert run(path, teacher.url, out).kept == 1 and out.exists()
        assert run(path, teacher.url, out, restart=True).kept == 0 and not out.exists()
        # What was paid for is set aside, not lost.
        assert "I add." in (tmp_path / "o.journal.old.jsonl").read_text()


def test_thoughts_are_counted(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    thought = "<think>\nHm: <answer>7</answer>\n</think>\n\n"
    with serving(lambda q, n: Say(("" if number_of(q) else thought) + good(str(number_of(q)))), problems) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet")
    assert report.kept == 2 and report.thoughts == 1
    assert "Hm" not in str(next(read_conversations(tmp_path / "o.parquet")).messages)


@pytest.mark.parametrize(("stateful", "kept"), [(True, 2), (False, 0)])
def test_the_programs_of_an_answer_may_share_an_interpreter(tmp_path: Path, stateful: bool, kept: int) -> None:
    problems, path = made(2, tmp_path)

    def script(question: str, before: int) -> Say:
        n = number_of(question)
        return Say(join("I set.", write_code(f"x = {n}\nprint(x)"), write_output(str(n)), "I double.",
                        write_code("print(x + 0)"), write_output(str(n)), write_answer(rf"\boxed{{{n}}}")))  # fmt: skip

    with serving(script, problems) as teacher:
        job = Job(str(path), tmp_path / "o.parquet", TeacherConfig(teacher.url, "m"))
        job = replace(job, sandbox=QUICK.model_copy(update={"stateful": stateful}))
        report = generate(job, QUIET)
        assert report.kept == kept and report.rejected["execution: error"] == 2 - kept
        assert ("one interpreter" in str(teacher.bodies[0])) is stateful


def test_a_sandbox_that_fails_rejects_nothing(tmp_path: Path) -> None:
    problems, path = made(2, tmp_path)
    out = tmp_path / "o.parquet"
    lost = True
    fake = ServedFake(lambda request: infra_result("lost") if lost else done(request.code[6:].split()[0] + "\n"))
    with serving(lambda q, _: Say(good(str(number_of(q)))), problems) as teacher, served(fake) as url:
        limits = SandboxConfig(url=url, timeout_s=5, retries=0)
        job = Job(str(path), out, TeacherConfig(teacher.url, "m"), sandbox=limits)
        first = generate(job, QUIET)
        assert (first.answered, first.undecided, first.kept, dict(first.rejected)) == (2, 2, 0, {})
        lost = False
        second = generate(job, QUIET)
        assert (second.undecided, second.kept, second.requests) == (0, 2, 2)


@contextmanager
def served(fake: ServedFake) -> Iterator[str]:
    """A scripted sandbox behind the real service, in a thread of its own."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        async with service(fake) as asker:
            stop = asyncio.Event()
            ready.put((asker.url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    fake.go = asyncio.Event()
    thread.start()
    url, loop, stop = ready.get(timeout=30)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def test_the_key_is_sent_and_nowhere_else(tmp_path: Path) -> None:
    problems, path = made(1, tmp_path)
    with serving(lambda q, _: Say(good("0")), problems) as teacher:
        job = Job(str(path), tmp_path / "o.parquet", TeacherConfig(teacher.url, "m", key="s3cret"), sandbox=QUICK)
        generate(job, QUIET)
        assert teacher.authorizations == {"Bearer s3cret"}
        (body,) = teacher.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 4096)
    for written in tmp_path.iterdir():
        assert b"s3cret" not in written.read_bytes()
