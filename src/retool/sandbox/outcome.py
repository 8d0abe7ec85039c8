"""One run of code as the supervisor sees it: the code goes in, output comes out, limits are kept, the kernel says how
it ended. Callbacks of the event loop only: no task, so nothing to cancel but what ``stop`` takes back."""

from __future__ import annotations

import asyncio
import codecs
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from retool.sandbox.link import Child
from retool.sandbox.wire import CODE_HEAD, Packet
from retool.types import ExecutionResult, ExecutionStatus

KILL_GRACE_S = 2.0
"""How long a killed run may take to end before it is answered without its wait status: a process in uninterruptible
sleep ends when it can, and its slot stays set aside until then."""
_CHUNK = 1 << 16
"""The capacity of a pipe (pipe(7))."""
_MEMORY_SHARE = 0.9
"""A process that a signal ended with this share of its memory in use is taken to have died of it."""
_MEMORY_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
"""The kernel's own killer; failed allocations that C code did not look at; C++'s uncaught bad_alloc; a full tmpfs."""
_MEMORY_ERROR = re.compile(r"(\w+\.)*(_Array)?MemoryError(:.*)?|OSError: \[Errno 12\].*")
"""The last line of a traceback; numpy's is ``numpy._core._exceptions._ArrayMemoryError``; 12 is ENOMEM, from mmap."""


@dataclass(frozen=True)
class Limits:
    timeout_s: float
    output_bytes: int
    """Of stdout, and again of stderr."""
    memory_kb: int


class Ending(Enum):
    REPORTED = auto()
    """The zygote passed on the kernel's wait status."""
    OVERDUE = auto()
    """Killed, and still no report after ``KILL_GRACE_S``."""
    NOT_BEGUN = auto()
    """The child died before it had all its code: try another."""
    LOST = auto()
    """The zygote is gone."""


class Run:
    """One child from the moment it gets its code. ``ended`` is set exactly once."""

    def __init__(self, child: Child, limits: Limits, kill: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self.child = child
        self.ended: asyncio.Future[Ending] = loop.create_future()
        self._limits = limits
        self._kill = kill
        self._loop = loop
        self._started = 0.0
        self._unsent = memoryview(b"")
        self._buffers = (bytearray(), bytearray())
        self._open: set[int] = set()
        """Descriptors that the loop reads for us."""
        self._timer: asyncio.TimerHandle | None = None
        self._overflowed = False
        self._expired = False
        self._exit: Packet | None = None

    def begin(self, source: bytes) -> None:
        """Send the code and start the clock."""
        for index, descriptor in enumerate(self.child.outputs):
            self._loop.add_reader(descriptor, self._read, index)
            self._open.add(descriptor)
        self._unsent = memoryview(CODE_HEAD.pack(self._limits.timeout_s, len(source)) + source)
        self._started = time.monotonic()
        self._timer = self._loop.call_later(self._limits.timeout_s, self._expire)
        self._write()
        if self._unsent:
            self._loop.add_writer(self.child.code, self._write)

    def stop(self) -> None:
        """Take everything back from the loop. Must come before the child's descriptors are closed."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.child.dropped:
            self._loop.remove_writer(self.child.code)
        for descriptor in self._open:
            self._loop.remove_reader(descriptor)
        self._open.clear()

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[self.child.code.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            # The child is gone; its end will be reported, and ``_unsent`` says that it never began.
            self._loop.remove_writer(self.child.code)
            return
        if not self._unsent:
            self._loop.remove_writer(self.child.code)

    def _read(self, index: int) -> bool:
        """One chunk; False where there is nothing more to read for now."""
        descriptor, buffer = self.child.outputs[index], self._buffers[index]
        room = self._limits.output_bytes - len(buffer)
        try:
            # One byte more than fits tells a full buffer from too much.
            chunk = os.read(descriptor, min(_CHUNK, room + 1))
        except BlockingIOError:
            return False
        if not chunk:
            self._open.discard(descriptor)
            self._loop.remove_reader(descriptor)
            return False
        buffer += chunk[:room]
        if len(chunk) <= room:
            return True
        self._overflowed = True
        self.stop()
        self._kill_and_wait()
        return False

    def _expire(self) -> None:
        if not self.ended.done():
            self._expired = True
            self._kill_and_wait()

    def _kill_and_wait(self) -> None:
        self._kill()
        self._timer = self._loop.call_later(KILL_GRACE_S, self._end, Ending.OVERDUE)

    def on_exit(self, packet: Packet) -> None:
        """The kernel's report is here, so all that the program wrote is in the pipes. What its descendants may still
        write is not waited for."""
        self._exit = packet
        for index in range(len(self._buffers)):
            while not self._overflowed and self._read(index):
                pass
        begun = not self._unsent or self._expired or self._overflowed
        self._end(Ending.REPORTED if begun else Ending.NOT_BEGUN)

    def on_lost(self) -> None:
        self._end(Ending.LOST)

    def _end(self, ending: Ending) -> None:
        self.stop()
        if not self.ended.done():
            self.ended.set_result(ending)

    # -- the answer ----------------------------------------------------------------------------------------------------

    def result(self) -> ExecutionResult:
        """Output cap, deadline and wait status, in this order of precedence; nothing that the program says of itself,
        but for a traceback that ends in MemoryError."""
        stdout, stderr = (_decode(bytes(buffer), self._overflowed) for buffer in self._buffers)
        ended_at = self._exit.at if self._exit is not None else time.monotonic()
        duration_s = max(0.0, ended_at - self._started)
        status, exit_code = self._status(duration_s, stderr)
        return ExecutionResult(status, stdout, stderr, exit_code, duration_s, self._overflowed)

    def _status(self, duration_s: float, stderr: str) -> tuple[ExecutionStatus, int | None]:
        if self._overflowed:
            return ExecutionStatus.OUTPUT_LIMIT, None
        # The loop may have been busy when the deadline passed: the time of the end decides, not when we heard of it.
        if self._exit is None or self._expired or duration_s > self._limits.timeout_s:
            return ExecutionStatus.TIMEOUT, None
        code = os.waitstatus_to_exitcode(self._exit.number)
        if code == 0:
            return ExecutionStatus.OK, 0
        if code > 0:
            return (ExecutionStatus.MEMORY if _ends_in_memory_error(stderr) else ExecutionStatus.ERROR), code
        if -code == signal.SIGXCPU:
            return ExecutionStatus.TIMEOUT, None
        if -code in _MEMORY_SIGNALS and self._exit.peak_kb > _MEMORY_SHARE * self._limits.memory_kb:
            return ExecutionStatus.MEMORY, code
        return ExecutionStatus.KILLED, code


def check_timeout(timeout_s: float) -> None:
    """Raises: ValueError where it is not a positive, finite number."""
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ValueError(f"timeout_s = {timeout_s!r}: give a positive, finite number of seconds")


def _ends_in_memory_error(stderr: str) -> bool:
    return bool(_MEMORY_ERROR.fullmatch(stderr.rstrip().rsplit("\n", 1)[-1]))


def _decode(data: bytes, cut: bool) -> str:
    """UTF-8, with what is not replaced; a character that the cap cut in two is left out, so that a prefix stays one."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not cut)
