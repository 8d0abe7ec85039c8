"""The supervisor: hands code to jailed children in the order in which it came, and answers with typed results.

It lives in the trainer's process and event loop. Everything that it believes comes from the kernel: pipes, wait
statuses (through the zygote, which runs no user code) and its own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections import deque
from types import TracebackType

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox.link import Child, Link
from retool.sandbox.outcome import Ending, Limits, Run, check_timeout
from retool.sandbox.tier import SandboxInfo, info_from_zygote
from retool.sandbox.wire import Packet
from retool.types import ExecutionResult, ExecutionStatus

IDLE_DEATHS = 3
"""Children per worker that may die without having got code, with no run in between, before the zygote is given up."""
QUEUE_LOSSES = 20
"""Zygotes that a waiting call may see die before it is answered INFRA. Far more than one call's own retries: who
waits is not to blame."""


class _LostError(Exception):
    """The machine failed under a run."""


class LocalSandbox:
    """Runs Python programs in jailed single-use children of a warmed-up zygote process (``retool.protocols.Sandbox``).

    At most ``config.workers`` programs run at a time; further calls wait in the order in which they came, and their
    deadlines start with their code. The first call starts the zygote, unless ``start`` did. Use it from one event loop,
    in a thread that outlives it: the zygote dies with the thread that started it.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self._config = config or SandboxConfig()
        self._workers = self._config.workers or 2 * (os.cpu_count() or 1) + 8
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = asyncio.Lock()
        self._link: Link | None = None
        self._info: SandboxInfo | None = None
        self._idle: deque[Child] = deque()
        self._waiting: deque[asyncio.Future[Child]] = deque()
        self._runs: dict[Child, Run] = {}
        self._idle_deaths = 0
        self._closed = False

    @property
    def info(self) -> SandboxInfo | None:
        """What the zygote found out about this machine; None before it started."""
        return self._info

    @property
    def zygote_pid(self) -> int | None:
        """None while no zygote runs."""
        return self._link.pid if self._link is not None and self._info is not None else None

    async def __aenter__(self) -> LocalSandbox:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> SandboxInfo:
        """Start the zygote unless it runs.

        Raises:
            SandboxBroken: it did not come up, or no code can be jailed on this machine.
            RuntimeError: closed, or used from another event loop.
        """
        self._check_use()
        async with self._starting:
            self._check_use()
            if self._link is None or self._info is None:
                link = self._link = Link(self, self._config, self._workers)
                try:
                    said = await link.start()
                except BaseException:
                    self._link = None
                    raise
                self._info = info_from_zygote(said)
            return self._info

    def _check_use(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this sandbox is closed: make a new LocalSandbox")
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("this sandbox belongs to another event loop: make a new LocalSandbox in this one")
        return loop

    # -- running code --------------------------------------------------------------------------------------------------

    async def execute(self, code: str, timeout_s: float) -> ExecutionResult:
        """Run ``code`` as a Python program; see ``retool.protocols.Sandbox``.

        TIMEOUT and OUTPUT_LIMIT have no exit code. Each of stdout and stderr may have ``config.output_kb`` KiB; what
        was written before a limit is kept. Where the machine fails, the code is run again, ``config.retries`` times.

        Raises:
            ValueError: ``timeout_s`` is not a positive, finite number.
            RuntimeError: closed, or used from another event loop.
        """
        check_timeout(timeout_s)
        loop = self._check_use()
        source = code.encode("utf-8", "surrogatepass")
        limits = Limits(float(timeout_s), self._config.output_kb << 10, self._config.memory_mb << 10)
        reason = ""
        for _ in range(self._config.retries + 1):
            try:
                return await self._attempt(source, limits, loop)
            except (_LostError, SandboxBroken) as fault:
                reason = str(fault)
                if self._closed:
                    break
        return ExecutionResult(ExecutionStatus.INFRA, stderr=reason)

    async def _attempt(self, source: bytes, limits: Limits, loop: asyncio.AbstractEventLoop) -> ExecutionResult:
        child = await self._take_child(loop)
        link = self._link
        if link is None or child.dropped:
            raise _LostError("the child died before it got the code")
        run = self._runs[child] = Run(child, limits, functools.partial(link.kill, child), loop)
        try:
            run.begin(source)
            ending = await run.ended
        except asyncio.CancelledError:  # which also cancelled ``run.ended``
            run.stop()
            link.kill(child)
            raise
        finally:
            del self._runs[child]
        if ending is Ending.LOST:
            raise _LostError("the sandbox's zygote died")
        if ending is Ending.NOT_BEGUN:
            raise _LostError("the child died before it got the code")
        if ending is Ending.OVERDUE and not child.kill_acknowledged:
            link.give_up("the sandbox's zygote does not answer")
        self._idle_deaths = 0
        return run.result()

    async def _take_child(self, loop: asyncio.AbstractEventLoop) -> Child:
        """An idle child, when it is this call's turn.

        Raises:
            _LostError: zygotes keep dying, or the sandbox was closed.
            SandboxBroken: the zygote cannot be started.
        """
        for _ in range(QUEUE_LOSSES):
            if self._closed:
                raise _LostError("the sandbox was closed")
            if self._link is None or self._info is None:
                with contextlib.suppress(RuntimeError):  # closed meanwhile: the next round says so
                    await self.start()
                continue
            if self._idle and not self._waiting:
                return self._idle.popleft()
            turn: asyncio.Future[Child] = loop.create_future()
            self._waiting.append(turn)
            try:
                return await turn
            except _LostError:
                continue
            except asyncio.CancelledError:
                if turn.cancelled():
                    self._waiting.remove(turn)
                elif turn.exception() is None and not turn.result().dropped:
                    self.on_child(turn.result())
                raise
        raise _LostError("the sandbox's zygote keeps dying")

    # -- what the link tells -------------------------------------------------------------------------------------------

    def on_child(self, child: Child) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(child)
                return
        self._idle.append(child)

    def on_exit(self, child: Child, packet: Packet) -> None:
        run = self._runs.get(child)
        if run is not None:
            run.on_exit(packet)
        elif child in self._idle:
            self._idle.remove(child)
            self._idle_deaths += 1
            if self._idle_deaths > IDLE_DEATHS * self._workers and self._link is not None:
                self._link.give_up("the sandbox's children die before they get code")

    def on_lost(self, reason: str) -> None:
        self._link = None
        self._idle_deaths = 0
        self._forget(reason)

    def _forget(self, reason: str) -> None:
        self._idle.clear()
        for run in list(self._runs.values()):
            run.on_lost()
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_exception(_LostError(reason))

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Kill everything that still runs (its callers get INFRA) and leave no process, descriptor or folder behind.

        May be called again, and from another event loop where the first one is gone."""
        self._closed = True
        link, self._link = self._link, None
        if self._loop is not None and not self._loop.is_closed():
            self._forget("the sandbox was closed")
        if link is not None:
            await link.close()
