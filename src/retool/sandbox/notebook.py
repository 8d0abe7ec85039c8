"""A notebook's cells, one after the other in one session, as SandboxFusion's ``/run_jupyter`` runs them."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from retool.sandbox.fusion import (
    Cell,
    CommandResult,
    CommandStatus,
    RunJupyterAnswer,
    RunJupyterRequest,
    RunStatus,
    encode_files,
    pod_name,
)
from retool.types import Execution, ExecutionRequest, ExecutionResult, ExecutionStatus


class Sessions(Protocol):
    """What a notebook needs of a sandbox."""

    async def run(self, request: ExecutionRequest) -> Execution: ...

    async def end_session(self, session: str, fetch: tuple[str, ...] = ()) -> Execution:
        """End the session's interpreter and bring files back; the result is the last run's."""
        ...

    def release(self, session: str) -> None: ...


class InfraFault(Exception):
    """A cell could not be run: the sandbox's fault, not the notebook's."""


@dataclass
class _Progress:
    cells: list[Cell] = field(default_factory=list)
    duration_s: float = 0.0
    """Of the cells alone: waiting for a turn does not count against ``total_timeout``."""
    last: ExecutionResult | None = None
    ended: bool = False
    """The interpreter is gone, and what the cells had made with it."""


async def run_notebook(sandbox: Sessions, request: RunJupyterRequest, tier: str) -> RunJupyterAnswer:
    """Run the cells. One that raises does not stop those after it, as in SandboxFusion; one that runs out of time, or
    takes its interpreter with it, does. The session is ended however this ends.

    Raises:
        InfraFault: the sandbox failed.
        ValueError: a file's name or a limit is not allowed, or a file is not base64 (``Base64Error``).
    """
    session = f"jupyter-{uuid.uuid4().hex}"
    files = request.decoded_files()
    fetch = tuple(request.fetch_files)
    ExecutionRequest("", request.total_timeout, files=files, fetch=fetch)  # refuses wrong names before anything runs
    if not request.cells:
        return _answer(_Progress(), Execution(ExecutionResult(ExecutionStatus.OK)), tier)
    progress = _Progress()
    try:
        for index, code in enumerate(request.cells):
            await _run_cell(sandbox, request, progress, code, session, files if index == 0 else {})
            if progress.ended:
                break
        end = await sandbox.end_session(session, fetch)
    finally:
        sandbox.release(session)
    return _answer(progress, end, tier)


async def _run_cell(
    sandbox: Sessions, request: RunJupyterRequest, progress: _Progress, code: str, session: str, files: dict[str, bytes]
) -> None:
    left_s = request.total_timeout - progress.duration_s
    if left_s <= 0:
        progress.last = ExecutionResult(ExecutionStatus.TIMEOUT)
        progress.ended = True
        return
    timeout_s = min(request.cell_timeout or left_s, left_s)
    execution = await sandbox.run(
        ExecutionRequest(code, timeout_s, files=files, session=session, memory_mb=request.memory_mb)
    )
    result = execution.result
    if result.status is ExecutionStatus.INFRA:
        raise InfraFault(result.stderr)
    progress.cells.append(_cell(result))
    progress.duration_s += result.duration_s
    progress.last = result
    # No exit code, or a signal: there is no interpreter any more that could go on.
    progress.ended = result.exit_code is None or result.exit_code < 0


def _answer(progress: _Progress, end: Execution, tier: str) -> RunJupyterAnswer:
    last = progress.last or ExecutionResult(ExecutionStatus.OK, exit_code=0)
    timed_out = last.status is ExecutionStatus.TIMEOUT
    if progress.ended:
        status = CommandStatus.TIME_LIMIT_EXCEEDED if timed_out else CommandStatus.ERROR
    else:
        status = CommandStatus.FINISHED
    driver = CommandResult(
        status=status,
        execution_time=progress.duration_s,
        return_code=last.exit_code if progress.ended else 0,
        stdout="",
        stderr="",
        truncated=last.truncated,
        retool_status=last.status if progress.ended else ExecutionStatus.OK,
    )
    return RunJupyterAnswer(
        status=RunStatus.FAILED if progress.ended else RunStatus.SUCCESS,
        message=f"the notebook ended early: {last.status}" if progress.ended else "",
        driver=driver,
        cells=progress.cells,
        executor_pod_name=pod_name(tier),
        files=encode_files(end),
        not_fetched=dict(end.not_fetched),
        tier=tier,
    )


def _cell(result: ExecutionResult) -> Cell:
    if result.status is ExecutionStatus.OK:
        return Cell(stdout=result.stdout, stderr=result.stderr, retool_status=result.status)
    if result.exit_code is None or result.exit_code < 0:
        name = {ExecutionStatus.TIMEOUT: "TimeoutError", ExecutionStatus.MEMORY: "MemoryError"}.get(result.status)
        error = _error(name or "DeadKernelError", f"the interpreter was ended: {result.status}", [])
        return Cell(stdout=result.stdout, stderr=result.stderr, error=[error], retool_status=result.status)
    stderr, error = split_traceback(result.stderr, result.exit_code)
    return Cell(stdout=result.stdout, stderr=stderr, error=[error], retool_status=result.status)


_TRACEBACK = "Traceback (most recent call last):\n"
_CHAINED = (
    "\nDuring handling of the above exception, another exception occurred:\n\n",
    "\nThe above exception was the direct cause of the following exception:\n\n",
)
_NO_FRAME = re.compile(r'^  File ".*", line \d+\n', re.MULTILINE)
"""How the report of a SyntaxError begins, which has no traceback: a frame's line goes on with ``, in …``."""
_NAMED = re.compile(r"^(?P<name>[^\W\d][\w.]*)(?:: (?P<value>.*))?$", re.DOTALL | re.MULTILINE)
"""The first line that is not indented, to the end of the text: a message may have several lines."""


def split_traceback(stderr: str, exit_code: int) -> tuple[str, dict[str, Any]]:
    """What the cell wrote to stderr, and the exception that ended it as Jupyter tells it.

    Text that looks like a traceback at the end of stderr is taken for one: what the cell says of itself is its own
    affair."""
    start = last = _last_report(stderr)
    if start < 0:
        return stderr, _error("SystemExit", str(exit_code), [])
    while (chained := next((c for c in _CHAINED if stderr.endswith(c, 0, start)), None)) is not None:
        before = _last_report(stderr[: start - len(chained)])
        if before < 0:
            break
        start = before
    named = _NAMED.search(stderr, last + len(_TRACEBACK) if stderr.startswith(_TRACEBACK, last) else last)
    lines = stderr[start:].rstrip("\n").split("\n")
    if named is None:
        return stderr[:start], _error("Error", "", lines)
    name = named["name"].rpartition(".")[2]
    return stderr[:start], _error(name, (named["value"] or "").rstrip("\n"), lines)


def _last_report(stderr: str) -> int:
    """Where the last traceback begins, or the last SyntaxError's report; -1 where there is none."""
    at = stderr.rfind(_TRACEBACK)
    while at > 0 and stderr[at - 1] != "\n":
        at = stderr.rfind(_TRACEBACK, 0, at)
    if at >= 0:
        return at
    reports = list(_NO_FRAME.finditer(stderr))
    return reports[-1].start() if reports else -1


def _error(name: str, value: str, traceback: list[str]) -> dict[str, Any]:
    return {"ename": name, "evalue": value, "traceback": traceback}
