"""math-verify behind a wall: a process of its own, with a limit on the time of each pair and on its memory.

Nothing here sets a signal handler, so any thread may ask, also where an event loop runs. A pair that takes too long,
or that kills the process, counts as wrong, is counted, and is remembered, so that a hostile answer that a whole group
gives costs its time once.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from retool.errors import InfraError

WORKER = Path(__file__).with_name("worker.py")
LIMIT_S = 3.0
"""Wall-clock seconds of one pair; ordinary ones take milliseconds."""
START_S = 120.0
"""Seconds in which the process must come up; sympy's import takes two on an idle machine."""
REMEMBERED = 65_536
"""Verdicts kept, the latest ones."""


@dataclass
class Counts:
    """What became of the pairs that were no plain numbers or words."""

    hard: int = 0
    """Pairs that math-verify judged, or should have."""
    timeouts: int = 0
    crashes: int = 0
    """The process died: out of memory, out of stack."""
    over_budget: int = 0
    """Not asked, since the time that may be lost was spent."""

    @property
    def unjudged(self) -> int:
        """Answers that count as wrong because no verdict came."""
        return self.timeouts + self.crashes + self.over_budget

    def metrics(self) -> dict[str, float]:
        """Under the names that ``retool.metrics`` defines."""
        return {f"grading/{name}": float(count) for name, count in vars(self).items()}

    def since(self, before: Counts) -> Counts:
        return Counts(**{name: count - getattr(before, name) for name, count in vars(self).items()})

    def copy(self) -> Counts:
        return Counts(**vars(self))


class Verifier:
    """One such process, started at the first question and again after each pair that it did not survive.

    Args:
        limit_s: wall-clock seconds of one pair.
        worker: the program; another one stands in for it in tests.
    """

    def __init__(self, limit_s: float = LIMIT_S, worker: Path = WORKER) -> None:
        self.limit_s, self.worker = limit_s, worker
        self.counts = Counts()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._verdicts: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._lost_s = 0.0
        self._budget_s = float("inf")

    def same(self, prediction: str, truth: str, *, plain: bool = False) -> bool:
        """Whether math-verify takes the two for the same; False where it cannot tell in time."""
        key = (prediction, truth)
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                return self._verdicts[key]
            self.counts.hard += 1
            if self._lost_s >= self._budget_s:
                self.counts.over_budget += 1
                return False
            verdict = self._verdicts[key] = self._ask(json.dumps([prediction, truth, plain]))
            while len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
            return verdict

    @contextmanager
    def budget(self, seconds: float) -> Iterator[None]:
        """While this is open, pairs that do not end may cost so many seconds in all; later ones are not asked."""
        with self._lock:
            self._budget_s = self._lost_s + seconds
        try:
            yield
        finally:
            with self._lock:
                self._budget_s = float("inf")

    def close(self) -> None:
        """End the process. A later question starts another."""
        with self._lock:
            self._stop()

    def _ask(self, question: str) -> bool:
        process = self._running()
        started = time.monotonic()
        try:
            assert process.stdin is not None
            process.stdin.write(question.encode() + b"\n")
            process.stdin.flush()
            answer = _line(process, self.limit_s)
        except OSError:  # it died between two questions
            answer = b""
        if answer is not None and answer.strip() in (b"0", b"1"):
            return answer.strip() == b"1"
        if answer is None:
            self.counts.timeouts += 1
        else:
            self.counts.crashes += 1
        self._stop()
        self._lost_s += time.monotonic() - started
        return False

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started if need be.

        Raises:
            InfraError: it does not come up.
        """
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if self._owner == os.getpid():
            self._stop()
        self._owner = os.getpid()  # a forked copy of us must not talk to our process
        started = time.monotonic()
        # -P: this folder's names must not hide the library's.
        command = [sys.executable, "-s", "-P", str(self.worker)]
        process = self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        ready = _line(process, START_S)
        if ready is None or ready.strip() != b"ready":
            if ready == b"":
                process.wait()  # its output has ended, so it is ending
            self._stop()
            raise InfraError(
                f"grading: the process for math-verify does not start (exit code {process.returncode}); "
                f"try '{' '.join(command)}'"
            )
        if self.counts.timeouts or self.counts.crashes:
            self._lost_s += time.monotonic() - started
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _line(process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
    """The process's next line; what there is of it where the process ended; None where the time is over."""
    assert process.stdout is not None
    descriptor, found = process.stdout.fileno(), b""
    deadline = time.monotonic() + limit_s
    poll = select.poll()  # select() takes no descriptor above 1023, and a large run has more
    poll.register(descriptor, select.POLLIN)
    while not found.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        piece = os.read(descriptor, 64)
        if not piece:
            return found
        found += piece
    return found


SHARED = Verifier()
"""The one that ``equivalent`` asks."""
atexit.register(SHARED.close)
