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
from retool.data.cold_start.checks import (
    VERSION,
    Checked,
    RejectedError,
    UndecidedError,
    check_programs,
    check_text,
    without_thoughts,
)
from retool.data.cold_start.journal import Journal, Key, fingerprint, set_aside
from retool.data.cold_start.report import SAMPLES, ColdStartReport, code_statistics, samples_page
from retool.data.cold_start.teacher import AskError, Budget, BudgetSpentError, Spent, Teacher, TeacherConfig
from retool.data.conversations import Row, write_conversations
from retool.data.prepare import Cleaning, Report, beside, check_out, clean, write_counts, write_whole
from retool.data.problem import Problem
from retool.data.prompts import prompt_messages
from retool.data.retool_sft import to_messages
from retool.data.sets import load_problems
from retool.errors import DataError
from retool.formats.tags import Block, Kind
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.sandbox.choose import open_sandbox
from retool.types import Conversation, Message

GIVE_UP = 20
"""Problems in a row without an answer (or twice the concurrency, if that is more) after which the teacher is left
alone: what the rest would cost is requests and hours."""


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


Wanted = list[tuple[Problem, int]]
"""Problems and numbers of their samples, in the set's order."""


@dataclass
class _State:
    """What there is so far, by the place in what is wanted."""

    job: Job
    wanted: Wanted
    answers: Journal
    verdicts: Journal
    checked: dict[int, Checked] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    undecided: set[int] = field(default_factory=set)
    spent: bool = False
    """The budget; nothing more is asked."""
    given_up: str = ""
    """Why the teacher is not asked any more, though there is a budget."""
    in_a_row: int = 0
    """Problems without an answer since the last answer."""
    asked: list[Key] = field(init=False)
    """Where each answer stands in the journal."""

    def __post_init__(self) -> None:
        self.asked = [
            Key(problem.id, sample, fingerprint(*(str(message["content"]) for message in self.question(problem))))
            for problem, sample in self.wanted
        ]

    def question(self, problem: Problem) -> list[Message]:
        """What the teacher is asked."""
        return prompt.messages_for(problem, stateful=self.job.sandbox.stateful)

    def entry(self, place: int) -> dict[str, Any]:
        """The answer that was written down, or what is known of failures; empty: nothing is."""
        return self.answers.entries.get(self.asked[place], {})

    def judged(self, place: int) -> Key:
        """Where the verdict on the answer stands: it depends on the truth, too."""
        problem, sample = self.wanted[place]
        entry = self.entry(place)
        return Key(problem.id, sample, fingerprint(str(entry["text"]), str(entry["finish"]), problem.answer))

    def recall(self, place: int) -> bool:
        """Take up a verdict of an earlier run, if there is one."""
        known = self.verdicts.entries.get(self.judged(place)) if "text" in self.entry(place) else None
        if known is None:
            return False
        if "rejected" in known:
            self.rejected[place] = str(known["rejected"])
        else:
            blocks = [Block(Kind(kind), text, raw) for kind, text, raw in known["blocks"]]
            self.checked[place] = Checked(blocks, Counter(known["statuses"]), known["replaced"], known["seconds"])
        return True


def generate(job: Job, progress: Progress) -> ColdStartReport:
    """Ask, check, write. What is in the journal is not asked for again; the output is written at the end, whole.

    Raises:
        ConfigError, DataError: the set, the output, the journal or the teacher is not as it should be; what was
            answered is kept.
    """
    started = time.monotonic()
    check_out(job.out, job.file or job.spec, *job.cleaning.reads())
    cleaning = Report(job.spec)
    # Not within the event loop: reading a large set takes minutes, and Ctrl-C ends it at once only out here.
    found = clean(load_problems(job.spec, file=job.file, columns=job.columns, split=job.split), job.cleaning, cleaning)
    problems = found[: job.limit or len(found)]
    if not problems:
        raise DataError(f"{job.file or job.spec}: no problem is left ({dict(cleaning.dropped)})")
    wanted = [(problem, sample) for problem in problems for sample in range(job.samples)]
    answers, verdicts = _open_journals(job)
    try:
        state = _State(job, wanted, answers, verdicts)
        budget = _budget(job, answers)
        left = [place for place in range(len(wanted)) if not state.recall(place)]
        asyncio.run(_work(state, left, budget, progress))
        report = _count(state, budget)
        report.cleaning, report.problems = cleaning.to_json(), len(problems)
        _write(state)
    finally:
        answers.close()
        verdicts.close()
    report.seconds = round(time.monotonic() - started, 1)
    write_counts(job.out, report.to_json())
    return report


def _open_journals(job: Job) -> tuple[Journal, Journal]:
    path, sandbox, teacher = beside(job.out, "journal.jsonl"), job.sandbox, job.teacher
    if job.restart:
        set_aside(path, beside(job.out, "journal.old.jsonl"))
    asked = {"--model": teacher.model, "--temperature": teacher.temperature, "--max-tokens": teacher.max_tokens,
             "--stateful": sandbox.stateful, "prompt": prompt.fingerprint()}  # fmt: skip
    answers = Journal(path, asked)
    judged = {"checks": VERSION, "--timeout-code": sandbox.timeout_s, "--keep-textual": job.textual,
              "--stateful": sandbox.stateful}  # fmt: skip
    try:
        return answers, Journal(beside(job.out, "checked.jsonl"), judged, disposable=True)
    except BaseException:
        answers.close()
        raise


def _budget(job: Job, answers: Journal) -> Budget:
    """The budget, less what all the journal's entries have cost."""
    budget = Budget(job.max_requests, job.max_total_tokens)
    for entry in answers.entries.values():
        budget.requests += int(entry.get("attempts", 0))
        budget.tokens += sum(int(entry.get(f"{name}_tokens", 0)) for name in ("prompt", "completion", "lost"))
    return budget


async def _work(state: _State, left: list[int], budget: Budget, progress: Progress) -> None:
    """Answers and verdicts for the places that have none."""
    total = len(state.wanted)
    with progress.stage("cold start", total=total) as stage:
        stage.advance(total - len(left))
        if not left:
            return
        teacher = Teacher(state.job.teacher, budget)
        try:
            sandbox = await open_sandbox(state.job.sandbox)
            try:
                queue = iter(left)

                async def worker() -> None:
                    for place in queue:  # the workers share one iterator
                        await _one(state, place, teacher, sandbox)
                        figures = {"kept": len(state.checked), "rejected": len(state.rejected)}
                        stage.advance(int("text" in state.entry(place)), **figures, tokens=budget.tokens)

                async with asyncio.TaskGroup() as group:
                    for _ in range(min(state.job.concurrency, len(left))):
                        group.create_task(worker())
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


async def _one(state: _State, place: int, teacher: Teacher, sandbox: Sandbox) -> None:
    """One answer: asked for unless it is there, and checked."""
    if "text" not in state.entry(place):
        await _ask(state, place, teacher)
    if "text" in state.entry(place):
        await _check(state, place, sandbox)


async def _ask(state: _State, place: int, teacher: Teacher) -> None:
    """Write down what the teacher answers, or why it does not."""
    if state.spent or state.given_up:
        return
    key, before, (problem, _) = state.asked[place], state.entry(place), state.wanted[place]
    spent = Spent(int(before.get("attempts", 0)), int(before.get("lost_tokens", 0)))
    said: dict[str, Any] = {}
    try:
        said = vars(await teacher.ask(state.question(problem), spent))
        state.in_a_row = 0
    except BudgetSpentError:
        state.spent = True
        if spent.attempts > int(before.get("attempts", 0)):
            said = {"failed": "the budget was spent"}
    except AskError as error:
        said = {"failed": error.reason, "said": error.said}
        state.in_a_row += 1
        if state.in_a_row >= max(GIVE_UP, 2 * state.job.concurrency):
            state.given_up = f"{error.reason}: {error.said}" if error.said else error.reason
    if said:
        state.answers.add(key, {**said, **vars(spent)})


async def _check(state: _State, place: int, sandbox: Sandbox) -> None:
    entry, (problem, sample), job = state.entry(place), state.wanted[place], state.job
    session = f"{problem.id}/{sample}/{place}" if job.sandbox.stateful else ""
    try:
        # Judging an answer may wait for math-verify's process: not in the loop that also reads the teacher's answers.
        blocks = await asyncio.to_thread(
            check_text, str(entry["text"]), str(entry["finish"]), problem.answer, textual=job.textual
        )
        checked = await check_programs(blocks, sandbox, job.sandbox.timeout_s, session=session)
    except UndecidedError:
        state.undecided.add(place)
    except RejectedError as reason:
        state.verdicts.add(state.judged(place), {"rejected": str(reason)})
        state.rejected[place] = str(reason)
    else:
        state.verdicts.add(state.judged(place), {
            "blocks": [list(block) for block in checked.blocks], "statuses": dict(checked.statuses),
            "replaced": checked.replaced, "seconds": round(checked.seconds, 3),
        })  # fmt: skip
        state.checked[place] = checked


def _count(state: _State, budget: Budget) -> ColdStartReport:
    """Drop repeated answers, and count."""
    said: set[tuple[str, str]] = set()
    for place, (problem, _) in enumerate(state.wanted):
        checked = state.checked.get(place)
        if checked is None:
            continue
        if (problem.question, checked.text) in said:
            del state.checked[place]
            state.rejected[place] = "the same as an earlier sample"
        said.add((problem.question, checked.text))
    entries = [state.entry(place) for place in range(len(state.wanted))]
    texts = [str(entry["text"]) for entry in entries if "text" in entry]
    kept = list(state.checked.values())
    return ColdStartReport(
        wanted=len(entries),
        answered=len(texts),
        failed=Counter(str(entry["failed"]) for entry in entries if "failed" in entry),
        said={str(entry["failed"]): str(entry["said"]) for entry in reversed(entries) if entry.get("said")},
        kept=len(kept),
        rejected=Counter(state.rejected.values()),
        undecided=len(state.undecided),
        thoughts=sum(without_thoughts(text) != text for text in texts),
        requests=budget.requests,
        prompt_tokens=sum(int(entry.get("prompt_tokens", 0)) for entry in entries),
        completion_tokens=sum(int(entry.get("completion_tokens", 0)) for entry in entries),
        lost_tokens=sum(int(entry.get("lost_tokens", 0)) for entry in entries),
        guessed=sum(bool(entry.get("guessed")) for entry in entries),
        budget_spent=state.spent,
        given_up=state.given_up,
        code=code_statistics(kept),
    )


def _write(state: _State) -> None:
    """The conversations in the problems' order, and samples to read."""
    rows = list[Row]()
    kept, rejected = list[dict[str, str]](), dict[str, dict[str, str]]()
    for place, (problem, sample) in enumerate(state.wanted):
        shown = {"id": problem.id, "question": problem.question, "answer": problem.answer}
        checked = state.checked.get(place)
        if checked is not None:
            id = f"{problem.id}/{sample}" if state.job.samples > 1 else problem.id
            turns = to_messages(checked.blocks) if state.job.form == "messages" else [
                {"role": "assistant", "content": checked.text}
            ]  # fmt: skip
            conversation = Conversation(id, [*prompt_messages(problem.question), *turns])
            rows.append(Row(conversation, problem.source, problem.answer))
            kept += [{**shown, "text": checked.text}] if len(kept) < SAMPLES else []
        elif place in state.rejected and state.rejected[place] not in rejected:
            rejected[state.rejected[place]] = {**shown, "text": str(state.entry(place).get("text", ""))}
    if rows:
        write_conversations(state.job.out, rows)
    else:
        state.job.out.unlink(missing_ok=True)  # an earlier run's rows do not belong to this report
    write_whole(beside(state.job.out, "samples.md"), samples_page(kept, rejected))
