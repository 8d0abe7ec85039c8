"""A child process that takes all of its own along when it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

GRACE_S = 30.0
"""What Ray's processes get to end by themselves."""
KILL_S = 10.0


class Child:
    """``python -m …`` in a session of its own: Ctrl-C on the terminal reaches whoever started it, not it. Leaving the
    ``with`` block ends it and every process that descends from it, however it came to that.

    Its standard input stays open until then, and it is expected to end when that ends: so it does not outlive a parent
    that was killed either.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._arguments, self._environment, self._log = list(arguments), dict(environment), log
        self._descendants: dict[int, psutil.Process] = {}

    def __enter__(self) -> Child:
        with self._log.open("ab") as log:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        self._me = psutil.Process(self._process.pid)
        return self

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self._notice()
        return self._process.poll()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._notice()
        pipe: IO[bytes] | None = self._process.stdin
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()  # the child takes that for SIGTERM
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._end_rest()

    def _notice(self) -> None:
        """Remember the child's descendants: one whose parent ends would be found no more."""
        with contextlib.suppress(psutil.Error):
            for process in [self._me, *self._me.children(recursive=True)]:
                self._descendants.setdefault(process.pid, process)
        for process in list(self._descendants.values()):
            with contextlib.suppress(psutil.Error):
                for other in process.children(recursive=True):
                    self._descendants.setdefault(other.pid, other)

    def _end_rest(self) -> None:
        deadline = time.monotonic() + GRACE_S
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        deadline = time.monotonic() + KILL_S
        while (rest := self._alive()) and time.monotonic() < deadline:
            for process in rest:
                with contextlib.suppress(psutil.Error):
                    process.kill()  # psutil makes sure that the number still means this process
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_S)

    def _alive(self) -> list[psutil.Process]:
        self._process.poll()
        self._notice()
        return [p for p in self._descendants.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
