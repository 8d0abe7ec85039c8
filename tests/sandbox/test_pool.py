"""The pool's promises to the trainer: order, deadlines, cancelling, retries, a clean end."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import PRELOAD, InSandbox, descendants, folder_of, identify, traces, wait_until

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.sandbox.jail import TIERS
from retool.types import ExecutionStatus

S = ExecutionStatus


@pytest.mark.parametrize("timeout_s", [0, 0.0, -1, -math.inf, math.inf, math.nan])
def test_impossible_timeouts_are_refused(timeout_s: float) -> None:
    sandbox = LocalSandbox()
    with pytest.raises(ValueError, match="timeout_s"):
        asyncio.run(sandbox.execute("print(1)", timeout_s))


def test_huge_timeout_is_fine(in_sandbox: InSandbox) -> None:
    assert in_sandbox(lambda sandbox: sandbox.execute("1", 1e300)).stdout == "1\n"


def test_surplus_calls_wait_in_order_and_their_clock_does_not_run(in_sandbox: InSandbox) -> None:
    async def scenario(sandbox: LocalSandbox) -> None:
        ended: list[int] = []

        async def call(index: int) -> None:
            result = await sandbox.execute("import time; time.sleep(.2)", 1.5)
            assert result.status is S.OK
            ended.append(index)

        # Eight waits of 0.2 s one after another are longer than the deadline of each.
        await asyncio.gather(*(call(index) for index in range(8)))
        assert ended == list(range(8))

    in_sandbox(scenario, workers=1)


def test_no_more_than_workers_run_at_once(in_sandbox: InSandbox) -> None:
    code = "import time; a = time.monotonic(); time.sleep(.1); print(a, time.monotonic())"

    async def scenario(sandbox: LocalSandbox) -> list[tuple[float, float]]:
        results = await asyncio.gather(*(sandbox.execute(code, 30) for _ in range(9)))
        return [(float(a), float(b)) for a, b in (result.stdout.split() for result in results)]

    spans = in_sandbox(scenario, workers=3)
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= 3
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) > 1


def test_many_mixed_runs_lose_and_leak_nothing(in_sandbox: InSandbox) -> None:
    kinds = [
        ("print({})", 20.0, S.OK, "{}\n"),
        ("print({}); 1 / 0", 20.0, S.ERROR, "{}\n"),
        ("print({}, flush=True)\nwhile True: pass", 0.2, S.TIMEOUT, "{}\n"),
        ("import os; print({}); os.abort()", 20.0, S.KILLED, "{}\n"),
        ("open('a', 'w').write('x' * 100); print({})", 20.0, S.OK, "{}\n"),
        ("[0] * 10**12", 20.0, S.MEMORY, ""),
    ]

    async def scenario(sandbox: LocalSandbox) -> None:
        before = len(os.listdir("/proc/self/fd"))

        async def call(index: int) -> None:
            code, timeout_s, status, stdout = kinds[0 if index % 3 else (index // 3) % len(kinds)]
            result = await sandbox.execute(code.format(index), timeout_s)
            # On a busy machine a short deadline may pass before the first line.
            assert result.status is status, result
            assert result.stdout == stdout.format(index) or status is S.TIMEOUT

        await asyncio.gather(*(call(index) for index in range(150)))
        # Channel, listener and a child's four for each slot.
        assert len(os.listdir("/proc/self/fd")) <= before + 6 * 4

    in_sandbox(scenario, workers=4)


def test_cancelled_waiters_leave_the_queue(in_sandbox: InSandbox) -> None:
    async def scenario(sandbox: LocalSandbox) -> None:
        calls = [asyncio.ensure_future(sandbox.execute(f"import time; time.sleep(.1); {i}", 30)) for i in range(6)]
        await asyncio.sleep(0.02)
        for call in calls[1:5]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [False, *[True] * 4, False]
        assert results[5].stdout == "5\n"  # type: ignore[union-attr]

    in_sandbox(scenario, workers=1)


def test_runs_in_flight_are_retried_when_the_zygote_dies(in_sandbox: InSandbox) -> None:
    async def scenario(sandbox: LocalSandbox) -> None:
        first = sandbox.zygote_pid
        assert first is not None
        calls = [asyncio.ensure_future(sandbox.execute("import time; time.sleep(.4); print(3)", 30)) for _ in range(6)]
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        assert [(result.status, result.stdout) for result in await asyncio.gather(*calls)] == [(S.OK, "3\n")] * 6
        assert sandbox.zygote_pid != first
        assert not os.path.exists(f"/proc/{first}")

    in_sandbox(scenario, retries=1)


def test_without_retries_the_answer_is_infra(in_sandbox: InSandbox) -> None:
    async def scenario(sandbox: LocalSandbox) -> None:
        call = asyncio.ensure_future(sandbox.execute("import time; time.sleep(100)", 100))
        await asyncio.sleep(0.2)
        os.kill(sandbox.zygote_pid or 0, signal.SIGKILL)
        result = await call
        assert (result.status, result.exit_code) == (S.INFRA, None)
        assert "zygote" in result.stderr

    in_sandbox(scenario, retries=0)


def test_nothing_survives_a_killed_zygote() -> None:
    async def scenario() -> None:
        sandbox = LocalSandbox(SandboxConfig(workers=2, retries=0, preload=PRELOAD))
        mark, folder = await identify(sandbox), folder_of(sandbox)
        call = asyncio.ensure_future(sandbox.execute("import time; time.sleep(1000)", 1000))
        while not sandbox.running:
            await asyncio.sleep(0.01)
        os.kill(sandbox.zygote_pid or 0, signal.SIGKILL)
        assert (await call).status is S.INFRA
        assert traces(mark) == []
        assert not os.path.exists(folder)
        await sandbox.close()

    asyncio.run(scenario())


def test_close_answers_what_runs_and_what_waits() -> None:
    async def scenario() -> None:
        sandbox = LocalSandbox(SandboxConfig(workers=1, preload=PRELOAD))
        mark, folder = await identify(sandbox), folder_of(sandbox)
        calls = [asyncio.ensure_future(sandbox.execute("import time; time.sleep(1000)", 1000)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.gather(sandbox.close(), sandbox.close())
        assert {result.status for result in await asyncio.gather(*calls)} == {S.INFRA}
        assert traces(mark) == [] and not os.path.exists(folder)
        with pytest.raises(RuntimeError, match="closed"):
            await sandbox.execute("1", 1)

    asyncio.run(scenario())


def test_close_without_start_and_while_starting() -> None:
    async def scenario() -> None:
        await LocalSandbox().close()
        sandbox = LocalSandbox(SandboxConfig(workers=1, preload=PRELOAD))
        call = asyncio.ensure_future(sandbox.execute("1", 10))
        await asyncio.sleep(0.01)
        await sandbox.close()
        assert (await call).status is S.INFRA

    asyncio.run(scenario())


def test_one_event_loop_only() -> None:
    sandbox = LocalSandbox(SandboxConfig(workers=1, preload=PRELOAD))
    assert asyncio.run(sandbox.execute("1", 30)).stdout == "1\n"
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(sandbox.execute("1", 30))
    asyncio.run(sandbox.close())


def run_apart(script: str, *arguments: str) -> list[str]:
    """The lines that ``script`` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


BROKEN = """
import asyncio, os, sys
from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox import LocalSandbox
async def main(preload):
    before = os.listdir("/proc/self/fd")
    sandbox = LocalSandbox(SandboxConfig(workers=1, retries=1, preload=preload))
    try:
        await sandbox.start()
    except SandboxBroken as error:
        print(error)
    result = await sandbox.execute("1", 5)
    print(result.status, result.stderr)
    await sandbox.close()
    print(os.listdir("/proc/self/fd") == before)
"""


def test_missing_interpreter(tmp_path: Path) -> None:
    lines = run_apart(BROKEN + "sys.executable = sys.argv[1]\nasyncio.run(main([]))", str(tmp_path / "none"))
    assert lines[0].startswith("the sandbox cannot start its zygote: ")
    assert lines[1:] == [f"infra {lines[0]}", "True"]


def test_preloaded_module_that_ends_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "deadly.py").write_text("import os; os._exit(3)")
    lines = run_apart(BROKEN + "sys.path.append(sys.argv[1])\nasyncio.run(main(['deadly']))", str(folder))
    assert lines[0].startswith("the sandbox cannot jail code here: ")
    assert lines[0].endswith("zygote: it ended early with exit code 3")
    assert lines[1:] == [f"infra {lines[0]}", "True"]


def test_preloaded_module_that_raises_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "sulky.py").write_text("raise SystemExit(3)")
    lines = run_apart(BROKEN + "sys.path.append(sys.argv[1])\nasyncio.run(main(['sulky', 'math']))", str(folder))
    assert lines == ["ok ", "True"]


def test_killed_trainer_leaves_nothing() -> None:
    script = """
import asyncio
from retool.sandbox import LocalSandbox
from retool.config import SandboxConfig
async def main():
    sandbox = LocalSandbox(SandboxConfig(workers=2, preload=[]))
    who = await sandbox.execute("import os; print(os.environ['RETOOL_SANDBOX'])", 30)
    print(who.stdout, end="", flush=True)
    await sandbox.execute("x = 1", 30, session="s")
    await sandbox.execute("import time; time.sleep(1000)", 1000)
asyncio.run(main())
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    mark = trainer.stdout.readline().strip()
    [launcher] = descendants(trainer.pid)[:1]
    folder = os.readlink(f"/proc/{launcher}/cwd")
    # Launcher, zygote, and a keeper and its child for two runs and a session.
    assert wait_until(lambda: len(descendants(trainer.pid)) == 8)
    left = descendants(trainer.pid)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in left) and not traces(mark))
    assert wait_until(lambda: not os.path.exists(folder))


def test_info_is_what_was_found(in_sandbox: InSandbox) -> None:
    async def scenario(sandbox: LocalSandbox) -> None:
        info = sandbox.info
        assert info is not None
        assert info.tier in TIERS and "rlimits" in info.layers and "no_new_privs" in info.layers
        assert set(info.modules) == set(PRELOAD)
        loaded = await sandbox.execute("import sys; print('decimal' in sys.modules, 'pydantic' in sys.modules)", 30)
        assert loaded.stdout == "True False\n"
        assert (
            await sandbox.execute("import platform; print(platform.python_version())", 30)
        ).stdout.strip() == info.python

    in_sandbox(scenario)
