"""Notebooks: cells of one session, and what is read off a traceback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from served import Asker, Reply, ServedFake, done, infra_result, service

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.sandbox.notebook import split_traceback
from retool.types import ExecutionRequest, ExecutionResult, ExecutionStatus


def play(sandbox: ServedFake, cells: list[str], /, **fields: Any) -> Reply:
    async def whole() -> Reply:
        async with service(sandbox, SandboxConfig(timeout_s=100)) as asker:
            return await asker.post("/run_jupyter", {"cells": cells} | fields)

    return asyncio.run(whole())


def scripted(request: ExecutionRequest) -> ExecutionResult:
    """A cell is named after its ending; each takes 10 seconds."""
    ending = ExecutionStatus(request.code)
    code = {ExecutionStatus.OK: 0, ExecutionStatus.ERROR: 1, ExecutionStatus.KILLED: -11}.get(ending)
    trace = 'Traceback (most recent call last):\n  File "x", line 1, in <module>\nKeyError: 1\n'
    stderr = trace if ending is ExecutionStatus.ERROR else ""
    return ExecutionResult(ending, f"{request.timeout_s:g}", stderr, code, 10.0)


def test_cells_share_one_session_that_is_ended() -> None:
    sandbox = ServedFake()
    sandbox.files = {"made": b"x"}
    reply = play(sandbox, ["1", "2"], files={"a": "eA=="}, fetch_files=["made", "not"], memory_limit_MB=64)
    assert [cell["stdout"] for cell in reply.data["cells"]] == ["ran 1", "ran 2"]
    assert [(r.code, dict(r.files), r.memory_mb) for r in sandbox.requests] == [("1", {"a": b"x"}, 64), ("2", {}, 64)]
    [session] = {request.session for request in sandbox.requests}
    assert session and sandbox.ended == [(session, ("made", "not"))] and sandbox.released == [session]
    assert (reply.data["files"], reply.data["not_fetched"]) == ({"made": "eA=="}, {"not": "no such file"})
    assert (reply.data["status"], reply.data["driver"]["status"], reply.data["driver"]["return_code"]) == (
        "Success",
        "Finished",
        0,
    )
    other = ServedFake()
    play(other, ["1"])
    assert other.requests[0].session != session


def test_an_exception_does_not_stop_the_cells_after_it() -> None:
    reply = play(ServedFake(scripted), ["ok", "error", "ok"])
    assert reply.data["status"] == "Success"
    first, second, third = reply.data["cells"]
    assert (first["error"], third["error"]) == ([], [])
    assert (second["error"][0]["ename"], second["error"][0]["evalue"], second["stderr"]) == ("KeyError", "1", "")


@pytest.mark.parametrize(
    ("ending", "driver", "code", "name"),
    [
        ("timeout", "TimeLimitExceeded", None, "TimeoutError"),
        ("killed", "Error", -11, "DeadKernelError"),
        ("output_limit", "Error", None, "DeadKernelError"),
        ("memory", "Error", None, "MemoryError"),
    ],
)
def test_what_takes_the_interpreter_with_it_ends_the_notebook(
    ending: str, driver: str, code: int | None, name: str
) -> None:
    reply = play(ServedFake(scripted), ["ok", ending, "ok"])
    assert (reply.status, reply.data["status"]) == (200, "Failed")
    assert (reply.data["driver"]["status"], reply.data["driver"]["return_code"]) == (driver, code)
    assert reply.data["driver"]["retool_status"] == ending
    assert [cell["retool_status"] for cell in reply.data["cells"]] == ["ok", ending]
    assert reply.data["cells"][1]["error"][0]["ename"] == name


def test_the_total_time_is_shared_by_the_cells() -> None:
    reply = play(ServedFake(scripted), ["ok"] * 4, total_timeout=25)
    assert [cell["stdout"] for cell in reply.data["cells"]] == ["25", "15", "5"]
    assert reply.data["driver"]["status"] == "TimeLimitExceeded"
    reply = play(ServedFake(scripted), ["ok"] * 3, total_timeout=45, cell_timeout=12)
    assert [cell["stdout"] for cell in reply.data["cells"]] == ["12", "12", "12"]
    assert reply.data["driver"]["status"] == "Finished"


def test_the_sandboxes_fault_is_503_and_ends_the_session() -> None:
    sandbox = ServedFake(lambda request: infra_result("gone") if request.code == "2" else done(""))
    reply = play(sandbox, ["1", "2", "3"])
    assert (reply.status, reply.data["detail"]) == (503, "gone")
    assert len(sandbox.released) == 1


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"cells": "1"}, "cells"),
        ({"cells": [1]}, "cells"),
        ({"cells": ["1"] * 1001}, "cells"),
        ({"kernel": "julia"}, "kernel"),
        ({"cell_timeout": -1}, "cell_timeout"),
        ({"total_timeout": 0}, "total_timeout"),
        ({"total_timeout": 101}, "total_timeout"),
        ({"memory_limit_MB": 5000}, "memory_limit_MB"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_notebook_is_422(fields: dict[str, Any], where: str) -> None:
    sandbox = ServedFake()
    reply = play(sandbox, ["1"], **fields)
    assert (reply.status, reply.data["detail"][0]["loc"][:2]) == (422, ["body", where])
    assert sandbox.requests == []


def test_a_wrong_name_is_refused_before_a_cell_runs() -> None:
    for fields in ({"files": {"../a": ""}}, {"fetch_files": ["/a"]}):
        sandbox = ServedFake()
        assert play(sandbox, ["1"], **fields).status == 422
        assert sandbox.requests == []


def test_no_cells_are_a_notebook_too() -> None:
    reply = play(ServedFake(), [])
    assert (reply.data["status"], reply.data["cells"]) == ("Success", [])


def report_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize(
    ("program", "name", "value"),
    [
        ("1 / 0", "ZeroDivisionError", "division by zero"),
        ("assert False", "AssertionError", ""),
        ("raise ValueError('two\\nlines: here')", "ValueError", "two\nlines: here"),
        (
            "import json; json.loads('{')",
            "JSONDecodeError",
            "Expecting property name enclosed in double quotes: line 1",
        ),
        ("try:\n  1 / 0\nexcept Exception as e:\n  raise KeyError('k') from e", "KeyError", "'k'"),
        ("try:\n  1 / 0\nexcept Exception as e:\n  raise KeyError('k')", "KeyError", "'k'"),
        ("x = = 1", "SyntaxError", "invalid syntax"),
        ("exec('x = = 1')", "SyntaxError", "invalid syntax"),
        (
            "import sys, traceback\ntry: 1 / 0\nexcept Exception: traceback.print_exc()\nraise OSError('x')",
            "OSError",
            "x",
        ),
    ],
)
def test_the_exception_is_read_off_the_traceback(program: str, name: str, value: str) -> None:
    report = report_of(program)
    warned, error = split_traceback(f"a warning\n{report}", 1)
    assert (error["ename"], error["evalue"].startswith(value)) == (name, True), error
    assert error["traceback"][-1] in report
    assert warned.startswith("a warning\n")
    assert (warned == "a warning\n") == ("print_exc" not in program)
    assert warned + "\n".join(error["traceback"]) == f"a warning\n{report}".rstrip("\n")


def test_an_exit_without_a_traceback() -> None:
    assert split_traceback("bye\n", 3) == ("bye\n", {"ename": "SystemExit", "evalue": "3", "traceback": []})


def test_a_real_notebook() -> None:
    async def whole() -> Reply:
        limits = SandboxConfig(workers=2, timeout_s=60, preload=[])
        cells = [
            "a = 123",
            "a",
            "print(a, open('d.txt').read())",
            "import sys; n = sys.stderr.write('note')",
            "1 / 0",
            "b",
        ]
        fields = {"files": {"d.txt": "eA=="}, "fetch_files": ["out"]}
        async with service(LocalSandbox(limits), limits) as asker:
            reply = await asker.post("/run_jupyter", {"cells": [*cells, "n = open('out', 'w').write('o')"], **fields})
            await ends_with_a_timeout(asker)
            return reply

    async def ends_with_a_timeout(asker: Asker) -> None:
        reply = await asker.post("/run_jupyter", {"cells": ["1", "while True: pass", "2"], "cell_timeout": 0.5})
        assert reply.data["driver"]["status"] == "TimeLimitExceeded"
        assert len(reply.data["cells"]) == 2

    reply = asyncio.run(whole())
    cells = reply.data["cells"]
    assert [cell["stdout"] for cell in cells] == ["", "123\n", "123 x\n", "", "", "", ""]
    assert cells[3]["stderr"] == "note"
    assert [cell["error"][0]["ename"] for cell in cells[4:6]] == ["ZeroDivisionError", "NameError"]
    assert (reply.data["status"], reply.data["files"]) == ("Success", {"out": "bw=="})
