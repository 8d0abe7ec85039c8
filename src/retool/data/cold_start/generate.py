"""The whole of it: problems → answers, each written down → checks → conversations, report, samples."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retool.config import SandboxConfig
from retool.data.cold_start import prompt
from retool.data.cold_start.checks import Checked, RejectedError, UndecidedError, check_programs, check_text
from retool.data.cold_start.journal import Journal, Key
from retool.data.cold_start.report import SAMPLES, ColdStartReport, code_statistics, samples_page
from retool.data.cold_start.teacher import AskError, Budget, BudgetSpentError, Teacher, TeacherConfig
from retool.data.conversations import Row, write_conversations
from retool.data.prepare import Cleaning, Report, beside, check_out, clean
from retool.data.problem import Problem
from retool.data.prompts import prompt_messages
from retool.data.retool_sft import to_messages
from retool.data.sets import load_problems
from retool.errors import DataError
from retool.formats.tags import Block, Kind
from retool.progress import Progress, Stage
from retool.protocols import Sandbox
from retool.sandbox.choose import open_sandbox
from retool.store import write_file
from retool.store.files import to_json
from retool.types import Conversation


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    spec: str
    out: Path
    teacher: TeacherConfig
    file: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    limit: int = 0
    """Problems at most; 0: all."""
    samples: int = 1
    """Answers a problem."""
    concurrency: int = 16
    max_requests: int = 0
    max_total_tokens: int = 0
    """Of all answers and prompts, earlier runs of this journal included; 0: no limit."""
    cleaning: Cleaning = field(default_factory=Cleaning)
    textual: bool = False
    """Keep answers without a program."""
    form: str = "messages"
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    restart: bool = False


@dataclass
class _State:
    """What the workers share."""

    job: Job
    answers: Journal
    verdicts: Journal
    sandbox: Sandbox
    teacher: Teacher
    stage: Stage
    checked: dict[Key, Checked] = field(default_factory=dict)
    rejected: dict[Key, str] = field(default_factory=dict)
    undecided: set[Key] = field(default_factory=set)
    spent: bool = False

    def show(self) -> None:
        tokens = self.teacher.budget.tokens
        self.stage.advance(kept=len(self.checked), rejected=len(self.rejected), tokens=tokens)


async def generate(job: Job, progress: Progress) -> ColdStartReport:
    """Ask, check, write. What is in the journal is not asked for again; the output is written at the end, whole.

    Raises:
        ConfigError, DataError: the set, the output, the journal or the teacher is not as it should be; what was
            answered is kept.
    """
    started = time.monotonic()
    check_out(job.out, job.file or job.spec)
    cleaning = Report(job.spec)
    problems = clean(
        load_problems(job.spec, file=job.file, columns=job.columns, split=job.split), job.cleaning, cleaning
    )
    problems = problems[: job.limit or len(problems)]
    if not problems:
        raise DataError(f"{job.file or job.spec}: no problem is left ({dict(cleaning.dropped)})")
    wanted = [(problem, sample) for problem in problems for sample in range(job.samples)]
    answers, verdicts = _open_journals(job)
    try:
        state = await _work(job, wanted, answers, verdicts, progress)
        report = _count(state, wanted)
        report.cleaning, report.problems = cleaning.to_json(), len(problems)
        _write(state, wanted, report)
    finally:
        answers.close()
        verdicts.close()
    report.seconds = round(time.monotonic() - started, 1)
    write_file(beside(job.out, "report.json"), to_json(report.to_json(), indent=2) + "\n")
    return report


def _open_journals(job: Job) -> tuple[Journal, Journal]:
    paths = beside(job.out, "journal.jsonl"), beside(job.out, "checked.jsonl")
    if job.restart:
        for path in paths:
            path.unlink(missing_ok=True)
    teacher = job.teacher
    asked = {"--model": teacher.model, "--temperature": teacher.temperature, "--max-tokens": teacher.max_tokens,
             "prompt": prompt.fingerprint()}  # fmt: skip
    answers = Journal(paths[0], asked)
    return answers, Journal(paths[1], {"--timeout-code": job.sandbox.timeout_s, "--keep-textual": job.textual})


async def _work(
    job: Job, wanted: list[tuple[Problem, int]], answers: Journal, verdicts: Journal, progress: Progress
) -> _State:
    budget = Budget(job.max_requests, job.max_total_tokens)
    for entry in answers.entries.values():
        budget.requests += int(entry.get("attempts", 0))
        budget.tokens += int(entry.get("prompt_tokens", 0)) + int(entry.get("completion_tokens", 0))
    queue = iter(wanted)
    teacher = Teacher(job.teacher, budget)
    try:
        sandbox = await open_sandbox(job.sandbox)
        try:
            with progress.stage("cold start", total=len(wanted)) as stage:
                state = _State(job, answers, verdicts, sandbox, teacher, stage)

                async def worker() -> None:
                    for problem, sample in queue:  # the workers share one iterator
                        await _one(state, problem, sample)

                async with asyncio.TaskGroup() as group:
                    for _ in range(min(job.concurrency, len(wanted))):
                        group.create_task(worker())
            return state
        finally:
            await sandbox.close()
    except BaseExceptionGroup as errors:
        # What one worker raised has ended the others: it is what there is to say.
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        await teacher.close()


async def _one(state: _State, problem: Problem, sample: int) -> None:
    """One answer: asked for unless it is there, and checked."""
    key = (problem.id, sample)
    entry = state.answers.entries.get(key)
    if entry is None or "text" not in entry:
        entry = await _ask(state, problem, key, int((entry or {}).get("attempts", 0)))
    if entry is not None:
        try:
            state.checked[key] = await _check(state, key, entry, problem)
        except RejectedError as reason:
            state.rejected[key] = str(reason)
        except UndecidedError:
            state.undecided.add(key)
        state.show()


async def _ask(state: _State, problem: Problem, key: Key, before: int) -> dict[str, Any] | None:
    """The entry of an answer, written down; None where there was none. ``before``: attempts of earlier runs."""
    if state.spent:
        return None
    try:
        answer = await state.teacher.ask(prompt.messages_for(problem))
    except BudgetSpentError as error:
        state.spent = True
        if error.attempts:
            state.answers.add(key, {"failed": "the budget was spent", "attempts": before + error.attempts})
        return None
    except AskError as error:
        state.answers.add(key, {"failed": error.reason, "attempts": before + error.attempts})
        return None
    state.answers.add(key, {**vars(answer), "attempts": before + answer.attempts})
    return state.answers.entries[key]


async def _check(state: _State, key: Key, entry: Mapping[str, Any], problem: Problem) -> Checked:
    known = state.verdicts.entries.get(key)
    if known is not None:
        return _recall(known)
    try:
        # Judging an answer may wait for math-verify's process: not in the loop that also reads the teacher's answers.
        blocks = await asyncio.to_thread(
            check_text, str(entry["text"]), str(entry["finish"]), problem.answer, textual=state.job.textual
        )
        checked = await check_programs(blocks, state.sandbox, state.job.sandbox.timeout_s)
    except RejectedError as reason:
        state.verdicts.add(key, {"rejected": str(reason)})
        raise
    state.verdicts.add(key, {
        "blocks": [list(block) for block in checked.blocks], "statuses": dict(checked.statuses),
        "replaced": checked.replaced, "seconds": round(checked.seconds, 3),
    })  # fmt: skip
    return checked


def _recall(entry: Mapping[str, Any]) -> Checked:
    if "rejected" in entry:
        raise RejectedError(entry["rejected"])
    blocks = [Block(Kind(kind), text, raw) for kind, text, raw in entry["blocks"]]
    return Checked(blocks, Counter(entry["statuses"]), entry["replaced"], entry["seconds"])


def _count(state: _State, wanted: list[tuple[Problem, int]]) -> ColdStartReport:
    """Drop repeated answers, and count."""
    said: set[tuple[str, str]] = set()
    for problem, sample in wanted:
        key = (problem.id, sample)
        checked = state.checked.get(key)
        if checked is None:
            continue
        if (problem.id, checked.text) in said:
            del state.checked[key]
            state.rejected[key] = "the same as an earlier sample"
        said.add((problem.id, checked.text))
    entries = {(p.id, s): state.answers.entries.get((p.id, s), {}) for p, s in wanted}
    kept = list(state.checked.values())
    return ColdStartReport(
        wanted=len(wanted),
        answered=sum("text" in entry for entry in entries.values()),
        failed=Counter(str(entry["failed"]) for entry in entries.values() if "failed" in entry),
        kept=len(kept),
        rejected=Counter(state.rejected.values()),
        undecided=len(state.undecided),
        requests=state.teacher.budget.requests,
        prompt_tokens=sum(int(entry.get("prompt_tokens", 0)) for entry in entries.values()),
        completion_tokens=sum(int(entry.get("completion_tokens", 0)) for entry in entries.values()),
        budget_spent=state.spent,
        code=code_statistics(
            [checked.programs for checked in kept],
            sum((checked.statuses for checked in kept), Counter[str]()),
            sum(checked.replaced for checked in kept),
        ),
    )


def _write(state: _State, wanted: list[tuple[Problem, int]], report: ColdStartReport) -> None:
    """The conversations in the problems' order, and samples to read."""
    rows = list[Row]()
    kept, rejected = list[dict[str, str]](), dict[str, dict[str, str]]()
    for problem, sample in wanted:
        key = (problem.id, sample)
        shown = {"id": problem.id, "question": problem.question, "answer": problem.answer}
        checked = state.checked.get(key)
        if checked is not None:
            id = f"{problem.id}/{sample}" if state.job.samples > 1 else problem.id
            turns = to_messages(checked.blocks) if state.job.form == "messages" else [
                {"role": "assistant", "content": checked.text}
            ]  # fmt: skip
            conversation = Conversation(id, [*prompt_messages(problem.question), *turns])
            rows.append(Row(conversation, problem.source, problem.answer))
            kept += [{**shown, "text": checked.text}] if len(kept) < SAMPLES else []
        elif key in state.rejected and state.rejected[key] not in rejected:
            rejected[state.rejected[key]] = {**shown, "text": str(state.answers.entries[key].get("text", ""))}
    if rows:
        write_conversations(state.job.out, rows)
    write_file(beside(state.job.out, "samples.md"), samples_page(kept, rejected))
