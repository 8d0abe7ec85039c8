"""Look for what a sandbox may have left behind. No absolute claim about the machine: only what carries our mark."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, ExecutionStatus

InSandbox = Callable[..., Any]
"""The fixture ``in_sandbox``."""

_WHO = "import os; print(os.environ['RETOOL_SANDBOX']); print(os.path.dirname(os.getcwd()))"


def marked_processes(mark: str) -> list[int]:
    """Processes that descend from the zygote whose environment holds ``mark``."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if f"RETOOL_SANDBOX={mark}".encode() in file.read():
                        found.append(int(name))
            except OSError:
                continue
    return found


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Whether ``condition`` came true; the patience only bounds a failing test."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def identify(sandbox: LocalSandbox) -> tuple[str, str]:
    """The mark and the folder of the running zygote."""
    result = await sandbox.execute(_WHO, 30)
    assert result.status is ExecutionStatus.OK, result
    mark, folder = result.stdout.split()
    return mark, folder


class SharedSandboxes:
    """One real sandbox per config, kept for a whole file in a loop and thread of its own, and searched after each run:
    the next run is right, and nothing lives below the zygote but its waiting children."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._known: dict[str, tuple[LocalSandbox, str, str]] = {}

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def execute(self, code: str, timeout_s: float = 30.0, **config: Any) -> ExecutionResult:
        workers = 2
        key = repr(sorted(config.items()))
        if key not in self._known:
            sandbox = LocalSandbox(SandboxConfig(workers=workers, **config))
            self._known[key] = (sandbox, *self._wait(identify(sandbox)))
        sandbox, mark, folder = self._known[key]
        zygote = sandbox.zygote_pid
        result: ExecutionResult = self._wait(sandbox.execute(code, timeout_s))
        after = self._wait(sandbox.execute("print('still', 'here')", 30.0))
        assert (after.status, after.stdout) == (ExecutionStatus.OK, "still here\n")
        assert sandbox.zygote_pid == zygote
        assert wait_until(lambda: len(descendants(zygote or 0)) <= workers), descendants(zygote or 0)
        assert wait_until(lambda: len(os.listdir(folder)) <= workers), os.listdir(folder)
        assert set(marked_processes(mark)) <= {zygote, *descendants(zygote or 0)}
        return result

    def close(self) -> None:
        for sandbox, mark, folder in self._known.values():
            self._wait(sandbox.close())
            assert marked_processes(mark) == []
            assert not os.path.exists(folder)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    found = []
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            for child in map(int, file.read().split()):
                found += [child, *descendants(child)]
    except OSError:
        pass
    return found
