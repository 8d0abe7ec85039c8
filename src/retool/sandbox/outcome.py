"""One run of code as the supervisor sees it: the code goes in, output comes out, limits are kept, the kernel says how
it ended. Callbacks of the event loop only: no task, so nothing to cancel but what ``stop`` takes back."""

from __future__ import annotations

import asyncio
import codecs
import os
import re
import signal
import time
from dataclasses import dataclass
from enum import Enum, auto

from retool.sandbox.link import Child
from retool.sandbox.wire import NOT_JAILED, Packet
from retool.types import ExecutionResult, ExecutionStatus

KILL_GRACE_S = 2.0
"""How long a killed run may take to end before it is answered without its wait status: a process in uninterruptible
sleep ends when it can, and its slot stays set aside until then."""
QUIET_S = 0.004
"""Output is first looked at so long after the start: most runs have ended by then, and are read once, at their end. A
pipe holds what is written meanwhile, and a writer waits no longer than this."""
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
    ENDED = auto()
    """The child stands at its end; the kernel says with which exit code."""
    REPORTED = auto()
    """The keeper passed on the kernel's wait status."""
    OVERDUE = auto()
    """Killed, and still no report after ``KILL_GRACE_S``."""
    NOT_BEGUN = auto()
    """The child died before it had all its code: try another."""
    LOST = auto()
    """The keeper or the zygote is gone."""


class Run:
    """One program in a child from the moment it gets its code. ``ended`` is set exactly once."""

    def __init__(self, child: Child, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.child = child
        self.ended: asyncio.Future[Ending] = loop.create_future()
        self._limits = limits
        self._loop = loop
        self._started = 0.0
        self._ended_at = 0.0
        self._unsent = memoryview(b"")
        self._writing = False
        self._buffers = (bytearray(), bytearray())
        self._reading: set[int] = set()
        """Descriptors that the loop reads for us."""
        self._look: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._full: set[int] = set()
        """Streams that were written more to than fits."""
        self._expired = False
        self._code: int | None = None
        self._exit: Packet | None = None
        self._out_of_memory = False

    def begin(self, order: bytes) -> None:
        """Send the code and start the clock."""
        self._unsent = memoryview(order)
        self._started = time.monotonic()
        self._timer = self._loop.call_later(self._limits.timeout_s, self._expire)
        self._look = self._loop.call_later(QUIET_S, self._start_reading)
        self._write()
        if self._unsent and not self.ended.done():
            self._writing = True
            self._loop.add_writer(self.child.code, self._write)

    def stop(self) -> None:
        """Take everything back from the loop. Must come before the child's descriptors are closed."""
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()
        self._stop_writing()
        for descriptor in self._reading:
            self._loop.remove_reader(descriptor)
        self._reading.clear()

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self.child.code, self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            # The child is gone; its end will be reported, and ``_unsent`` says that it never began.
            self._stop_writing()
            return
        if not self._unsent:
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self.child.code)

    def _start_reading(self) -> None:
        for index, descriptor in enumerate(self.child.outputs):
            self._reading.add(descriptor)
            self._loop.add_reader(descriptor, self._read, index)

    def _read(self, index: int) -> bool:
        """One chunk; False where there is nothing more to read for now."""
        if index in self._full:
            return False
        descriptor, buffer = self.child.outputs[index], self._buffers[index]
        room = self._limits.output_bytes - len(buffer)
        try:
            # One byte more than fits tells a full buffer from too much.
            chunk = os.read(descriptor, min(_CHUNK, room + 1))
        except BlockingIOError:
            return False
        if not chunk:
            if descriptor in self._reading:
                self._reading.discard(descriptor)
                self._loop.remove_reader(descriptor)
            return False
        buffer += chunk[:room]
        if len(chunk) <= room:
            return True
        if not self._full:
            self.stop()
            self._kill_and_wait()
        self._full.add(index)
        return False

    @property
    def _overflowed(self) -> bool:
        return bool(self._full)

    def _read_rest(self) -> None:
        """All that is in the pipes and fits. What descendants may still write is not waited for."""
        for index in range(len(self._buffers)):
            while self._read(index):
                pass

    def _expire(self) -> None:
        if not self.ended.done():
            self._expired = True
            self._kill_and_wait()

    def _kill_and_wait(self) -> None:
        self.child.kill()
        if not self.ended.done():
            self._timer = self._loop.call_later(KILL_GRACE_S, self._end, Ending.OVERDUE)

    def on_ended(self, code: int) -> None:
        """The kernel holds the child at its exit, so all that it wrote is in the pipes."""
        if self._expired or self._overflowed or self.ended.done():
            return
        self._ended_at = time.monotonic()
        self._code = code
        self._read_rest()
        if not self._overflowed:
            self._end(Ending.ENDED)

    def on_exit(self, packet: Packet) -> None:
        """The kernel's report is here."""
        if self.ended.done():
            return
        self._exit = packet
        self._ended_at = packet.at
        if packet.number & 0x7F:  # ended by a signal
            self._out_of_memory = self.child.slot.ran_out_of_memory()
        self._read_rest()
        begun = self._expired or os.waitstatus_to_exitcode(packet.number) != NOT_JAILED or not self.child.read_nothing()
        self._end(Ending.REPORTED if begun else Ending.NOT_BEGUN)

    def on_lost(self) -> None:
        self._end(Ending.LOST)

    def _end(self, ending: Ending) -> None:
        self.stop()
        if not self.ended.done():
            self.ended.set_result(ending)

    # -- the answer ----------------------------------------------------------------------------------------------------

    def result(self, tier: str) -> ExecutionResult:
        """Output cap, deadline and wait status, in this order of precedence; nothing that the program says of itself,
        but for a traceback that ends in MemoryError."""
        stdout, stderr = (_decode(bytes(buffer), self._overflowed) for buffer in self._buffers)
        duration_s = max(0.0, (self._ended_at or time.monotonic()) - self._started)
        status, exit_code = self._status(duration_s, stderr)
        return ExecutionResult(status, stdout, stderr, exit_code, duration_s, self._overflowed, tier)

    def _status(self, duration_s: float, stderr: str) -> tuple[ExecutionStatus, int | None]:
        if self._overflowed:
            return ExecutionStatus.OUTPUT_LIMIT, None
        if self._code is not None:
            code = self._code
        # The loop may have been busy when the deadline passed: the time of the end decides, not when we heard of it.
        elif self._exit is None or self._expired or duration_s > self._limits.timeout_s:
            return ExecutionStatus.TIMEOUT, None
        else:
            code = os.waitstatus_to_exitcode(self._exit.number)
        if code == 0:
            return ExecutionStatus.OK, 0
        if code > 0:
            return (ExecutionStatus.MEMORY if _ends_in_memory_error(stderr) else ExecutionStatus.ERROR), code
        if -code == signal.SIGXCPU:
            return ExecutionStatus.TIMEOUT, None
        if self._out_of_memory or (-code in _MEMORY_SIGNALS and self._used_up_memory()):
            return ExecutionStatus.MEMORY, code
        return ExecutionStatus.KILLED, code

    def _used_up_memory(self) -> bool:
        return self._exit is not None and self._exit.peak_kb > _MEMORY_SHARE * self._limits.memory_kb


def _ends_in_memory_error(stderr: str) -> bool:
    return bool(_MEMORY_ERROR.fullmatch(stderr.rstrip().rsplit("\n", 1)[-1]))


def _decode(data: bytes, cut: bool) -> str:
    """UTF-8, with what is not replaced; a character that the cap cut in two is left out, so that a prefix stays one."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not cut)
