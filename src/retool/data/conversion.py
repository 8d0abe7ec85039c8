"""ReTool-SFT, or any set in its form, as a file of conversations, with a report of the rows that break the grammar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from retool.data.conversations import Row, write_conversations
from retool.data.outputs import same_output
from retool.data.prepare import Cleaning, Report, beside, check_out, close_report, write_counts, write_lines
from retool.data.retool_sft import Converted, RowError, convert
from retool.data.sets import set_name, set_rows
from retool.errors import DataError
from retool.formats.tags import Kind
from retool.protocols import Sandbox
from retool.types import Conversation, ExecutionStatus


def convert_set(
    spec: str, *, file: str = "", wanted: Cleaning | None = None, report: Report
) -> list[tuple[str, Converted]]:
    """The rows that convert, with their ids (``retool-sft/17``); the others are in the report, by row and reason.

    Raises:
        ConfigError, DataError: see ``sets.set_rows``.
    """
    index = (wanted or Cleaning()).index()
    found = []
    name = set_name(spec)
    for number, row in enumerate(set_rows(spec, file=file)):
        report.read += 1
        id = f"{name}/{number}"
        try:
            converted = convert(row)
        except RowError as reason:
            report.drop(str(reason), id, row=number)
            continue
        match = index.match(converted.question)
        if match is not None:
            report.drop("contaminated", id, row=number, evaluation=match.id, kind=match.kind, shared=match.text)
            continue
        found.append((id, converted))
    programs = [sum(block.kind is Kind.CODE for block in converted.blocks) for _, converted in found]
    report.kept = len(found)
    report.notes |= {"programs": sum(programs), "rows without a program": programs.count(0)}
    return found


def prepare_conversations(
    spec: str,
    out: Path,
    *,
    file: str = "",
    form: str = "messages",
    wanted: Cleaning | None = None,
) -> tuple[Report, list[tuple[str, Converted]]]:
    """Write a set's conversations to ``out`` (Parquet), the report's counts beside it (``.report.json``) and the rows
    that were dropped, each with its number and reason (``.dropped.jsonl``).

    Args:
        form: ``messages``: tool calls and tool messages. ``tags``: the assistant's own string, to the character.

    Raises:
        ConfigError, DataError: see ``sets.set_rows``; or no row converts.
    """
    started = time.perf_counter()
    report = Report(spec)
    wanted = wanted or Cleaning()
    check_out(out, file or spec, *wanted.reads())
    found = convert_set(spec, file=file, wanted=wanted, report=report)
    if not found:
        raise DataError(
            f"{file or spec}: none of {report.read} rows converts ({dict(report.dropped)}); nothing is written"
        )
    write_conversations(out, (Row(Conversation(id, c.messages(form)), spec, c.answer) for id, c in found))
    close_report(out, report, started)
    return report, found


async def run_again(
    rows: Iterable[tuple[str, Converted]],
    sandbox: Sandbox,
    timeout_s: float,
    *,
    concurrency: int = 16,
    on_program: Callable[[bool], None] = lambda agrees: None,
) -> list[dict[str, Any]]:
    """Run every program anew, each by itself, and compare what it prints with what was recorded.

    Returns:
        What differs, in the rows' order: ``id``, ``program`` (counted from 0 within its row), ``status``, ``recorded``,
        ``real``. A fault of the sandbox (status ``infra``) says nothing about the row, and is listed too.
    """
    slots = asyncio.Semaphore(concurrency)

    async def compare(id: str, place: int, code: str, recorded: str) -> dict[str, Any] | None:
        async with slots:
            result = await sandbox.execute(code, timeout_s)
        agrees = result.status is not ExecutionStatus.INFRA and same_output(recorded, result.text)
        on_program(agrees)
        if agrees:
            return None
        return {
            "id": id, "program": place, "status": result.status.value, "recorded": recorded, "real": result.text,
            "code": code,
        }  # fmt: skip

    jobs = []
    for id, converted in rows:
        codes = [block.text for block in converted.blocks if block.kind is Kind.CODE]
        outputs = [block.text for block in converted.blocks if block.kind is Kind.OUTPUT]
        jobs += [compare(id, place, *pair) for place, pair in enumerate(zip(codes, outputs, strict=True))]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
    return [found for task in tasks if (found := task.result()) is not None]


def write_differences(out: Path, report: Report, programs: int, differences: list[dict[str, Any]]) -> None:
    """Add what ``run_again`` found to the report, and list it in ``.outputs.jsonl``."""
    infra = sum(found["status"] == ExecutionStatus.INFRA for found in differences)
    report.notes |= {
        "programs run again": programs,
        "programs whose output differs": len(differences) - infra,
        "rows with such a program": len({f["id"] for f in differences if f["status"] != ExecutionStatus.INFRA}),
        "programs that the sandbox lost": infra,
    }
    write_counts(out, report.to_json())
    write_lines(beside(out, "outputs.jsonl"), differences)
