"""Look for what a sandbox may have left behind. No absolute claim about the machine: others may use it too, so only
what carries our mark, what this process holds, and what became of its children."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, ExecutionStatus

InSandbox = Callable[..., Any]
"""The fixture ``in_sandbox``."""

PRELOAD = ["math", "random", "itertools", "fractions", "decimal"]
"""Less than the default, for many sandboxes are started."""
_CGROUPS = "/sys/fs/cgroup"
_WHO = "import os; print(os.environ['RETOOL_SANDBOX'])"


def marked_processes(mark: str) -> list[int]:
    """Processes that descend from the launcher whose environment holds ``mark``, as far as this user may see it."""
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


def marked_groups(mark: str) -> list[str]:
    """Control groups of the sandbox with this mark, anywhere."""
    name = f"retool-{mark[:12]}"
    return [os.path.join(place, name) for place, inner, _ in os.walk(_CGROUPS) if name in inner]


def traces(mark: str) -> list[str]:
    """All that carries the mark."""
    return [*describe(marked_processes(mark)), *marked_groups(mark)]


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Whether ``condition`` came true; the patience only bounds a failing test."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def until(
    condition: Callable[[], bool], patience_s: float = 10.0, state: Callable[[], object] = lambda: "it did not come"
) -> None:
    """The same while the event loop goes on.

    Raises:
        AssertionError: it did not come true; with what ``state`` says.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, state()
        await asyncio.sleep(0.01)


async def identify(sandbox: LocalSandbox) -> str:
    """The mark of the running zygote."""
    result = await sandbox.execute(_WHO, 30)
    assert result.status is ExecutionStatus.OK, result
    return result.stdout.strip()


class Snapshot(NamedTuple):
    """What this process has, and what lies in the places that sandboxes use."""

    descriptors: int
    folders: frozenset[str]
    mounts: frozenset[str]
    children: frozenset[int]


def snapshot() -> Snapshot:
    with open("/proc/self/mountinfo") as file:
        mounts = frozenset(file)
    folders = frozenset(glob.glob(os.path.join(tempfile.gettempdir(), "retool-sandbox-*")))
    return Snapshot(count_descriptors(), folders, mounts, frozenset(descendants(os.getpid())))


async def nothing_since(before: Snapshot, mark: str = "", folder: str = "") -> None:
    """Assert that all is as it was; ``folder``: the one that the sandbox had, where others have theirs beside it."""
    now = snapshot()
    assert now.descriptors == before.descriptors, sorted(os.listdir("/proc/self/fd"))
    assert now.mounts == before.mounts, now.mounts ^ before.mounts
    children = {pid for pid in now.children - before.children if not reaped(pid)}
    assert not children, describe(children)
    if mark:
        assert traces(mark) == []
    left = [folder] if folder else now.folders - before.folders
    assert not any(os.path.exists(path) for path in left), left


def reaped(pid: int) -> bool:
    """Whether ``pid`` is gone; one that has died as an orphan, and so as this process's child, is reaped first."""
    with contextlib.suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
    return not os.path.exists(f"/proc/{pid}")


def folder_of(sandbox: LocalSandbox) -> str:
    """What it has made in the machine's folder for temporary files: its launcher works there."""
    folder = os.readlink(f"/proc/{launcher_pid(sandbox)}/cwd")
    assert os.path.basename(folder).startswith("retool-sandbox-")
    return folder


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
    except OSError:
        pass
    return found


def launcher_pid(sandbox: LocalSandbox) -> int:
    """The zygote's parent."""
    with open(f"/proc/{sandbox.zygote_pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def below(sandbox: LocalSandbox) -> list[int]:
    """Launcher, zygote, keepers and children."""
    return [launcher_pid(sandbox), *descendants(launcher_pid(sandbox))]


def describe(pids: Any) -> list[str]:
    """Pids with what runs there."""
    found = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as command:
                found.append(f"{stat.read()[:40]} {command.read()[:80]!r}")
        except OSError:
            continue
    return found


class SharedSandboxes:
    """One real sandbox per config, kept for a whole file in a loop and thread of its own, and searched after each run:
    the next run is right, and nothing lives below the launcher but keepers and their waiting children."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._known: dict[str, tuple[LocalSandbox, str]] = {}

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def execute(self, code: str, timeout_s: float = 30.0, **config: Any) -> ExecutionResult:
        workers = 2
        key = repr(sorted(config.items()))
        if key not in self._known:
            sandbox = LocalSandbox(SandboxConfig(**({"workers": workers, "preload": PRELOAD} | config)))
            self._known[key] = (sandbox, self._wait(identify(sandbox)))
        sandbox, _ = self._known[key]
        zygote = sandbox.zygote_pid or 0
        result: ExecutionResult = self._wait(sandbox.execute(code, timeout_s))
        after = self._wait(sandbox.execute("print('still', 'here')", 30.0))
        assert (after.status, after.stdout) == (ExecutionStatus.OK, "still here\n")
        assert sandbox.zygote_pid == zygote
        # A keeper and its child for each worker.
        assert wait_until(lambda: len(descendants(zygote)) <= 2 * workers), describe(descendants(zygote))
        return result

    def close(self) -> None:
        for sandbox, mark in self._known.values():
            self._wait(sandbox.close())
            assert traces(mark) == []
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
