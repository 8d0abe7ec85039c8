"""A child process that takes all of its own along when it ends."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from retool.sandbox.kernel import set_subreaper

GRACE_S = 30.0
"""What Ray's processes get to end by themselves."""
KILL_S = 10.0
"""And then, once they have been told to."""
ERROR_LINE = re.compile(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)(?:\(\w+\))?: .+")
NOISE = re.compile(r"\x1b\[[\d;]*m|^\s*\([^()]*pid=[^()]*\)\s*")
"""Colours, and Ray's name of the worker that printed a line."""


class Child:
    """``python -m …`` in a session of its own: Ctrl-C on the terminal reaches whoever started it, not it. Leaving the
    ``with`` block ends it and every process that descends from it, however it came to that: while it is open, orphans
    come to this process.

    Its standard input stays open until then, and it is expected to end when that ends: so it does not outlive a parent
    that was killed either.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        grace_s: float = GRACE_S,
        kill_s: float = KILL_S,
    ) -> None:
        self._arguments, self._environment, self._log = list(arguments), dict(environment), log
        self._grace_s, self._kill_s = grace_s, kill_s

    def __enter__(self) -> Child:
        set_subreaper(True)
        self._others = {process.pid for process in psutil.Process().children(recursive=True)}
        with self._log.open("ab") as log:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        return self

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pipe: IO[bytes] | None = self._process.stdin
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()  # the child takes that for SIGTERM
        try:
            with contextlib.suppress(KeyboardInterrupt):  # whoever asks twice does not want to wait
                self._wait(self._grace_s)
            for end in (psutil.Process.terminate, psutil.Process.kill):
                with contextlib.suppress(KeyboardInterrupt):
                    self._end_all(end)
        finally:
            set_subreaper(False)

    def _end_all(self, end: Callable[[psutil.Process], None]) -> None:
        for process in self._alive():
            with contextlib.suppress(psutil.Error):
                end(process)  # psutil makes sure that the number still means this process
        self._wait(self._kill_s)

    def _wait(self, seconds: float) -> None:
        """Until all are gone, or the time is."""
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _alive(self) -> list[psutil.Process]:
        self._process.poll()
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in self._others and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def last_error(text: str) -> str:
    """The last line of a program's output that names an exception; empty where none does."""
    for line in reversed(text.splitlines()):
        if match := ERROR_LINE.search(NOISE.sub("", line).strip()):
            return match.group()[:300]
    return ""
