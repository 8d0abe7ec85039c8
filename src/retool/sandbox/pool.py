"""The supervisor: hands code to jailed children in the order in which it came, and answers with typed results.

It lives in the trainer's process and event loop. Everything that it believes comes from the kernel: pipes, held system
calls, wait statuses (through the keepers, which run no user code) and its own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox import fetching
from retool.sandbox.base import OneLoopSandbox
from retool.sandbox.link import Child, Link
from retool.sandbox.outcome import Ending, Limits, Run
from retool.sandbox.sessions import Session, Sessions
from retool.sandbox.tier import SandboxInfo, check_tier, info_from_zygote
from retool.sandbox.wire import Order, Packet, pack_order
from retool.types import Execution, ExecutionRequest, ExecutionResult, ExecutionStatus

IDLE_DEATHS = 3
"""Children per worker that may die without having got code, with no run in between, before the sandbox is called
broken."""
QUEUE_LOSSES = 20
"""Zygotes that a waiting call may see die before it is answered INFRA. Far more than one call's own retries: who
waits is not to blame."""


class LostError(Exception):
    """The machine failed under a run."""


class LocalSandbox(OneLoopSandbox):
    """Runs Python programs in jailed single-use children of a warmed-up zygote process (``retool.protocols.Sandbox``).

    At most ``workers`` programs run at a time; further calls wait in the order in which they came, and their deadlines
    start with their code. The first call starts the zygote, unless ``start`` did. Use it from one event loop, in a
    thread that outlives it: the zygote dies with the thread that started it.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        super().__init__()
        self._config = config or SandboxConfig()
        self._cores = os.cpu_count() or 1
        self.workers = self._config.workers or 2 * self._cores + 8
        """Programs that run at a time."""
        self._starting = asyncio.Lock()
        self._link: Link | None = None
        self._info: SandboxInfo | None = None
        self._idle: deque[Child] = deque()
        self._waiting: deque[asyncio.Future[Child]] = deque()
        self._runs: dict[Child, Run] = {}
        self._sessions = Sessions(self._config.session_idle_s, self.workers, self._end_interpreter)
        self._idle_deaths = 0

    @property
    def info(self) -> SandboxInfo | None:
        """What the zygote found out about this machine; None before it started."""
        return self._info

    @property
    def zygote_pid(self) -> int | None:
        """None while no zygote runs."""
        return self._link.zygote_pid if self._link is not None and self._info is not None else None

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return sum(not turn.done() for turn in self._waiting) + self._sessions.waiting

    @property
    def running(self) -> int:
        """Programs that have their code and have not ended."""
        return sum(not run.ended.done() for run in self._runs.values())

    async def start(self) -> SandboxInfo:
        """Start the zygote unless it runs.

        Raises:
            SandboxBroken: it did not come up, or no code can be jailed on this machine.
            SandboxRefused: this machine cannot give the tier that the config asks for.
            RuntimeError: closed, or used from another event loop.
        """
        self._check_use()
        async with self._starting:
            self._check_use()
            if self._link is None or self._info is None:
                link = self._link = Link(self, self._config, self.workers)
                try:
                    info = info_from_zygote(await link.start())
                    check_tier(info, self._config.tier)
                except BaseException:
                    if self._link is link:
                        self._link = None
                    await link.close()
                    raise
                self._info = info
            return self._info

    # -- running code --------------------------------------------------------------------------------------------------

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        """Run ``code`` as a Python program; see ``retool.protocols.Sandbox``, and ``run``.

        Raises:
            ValueError: ``timeout_s`` is not a positive, finite number.
        """
        return (await self.run(ExecutionRequest(code, timeout_s, session=session))).result

    async def run(self, request: ExecutionRequest) -> Execution:
        """Run a request.

        TIMEOUT and OUTPUT_LIMIT have no exit code; what was written before a limit is kept. Where the machine fails,
        the code is run again, ``config.retries`` times; in a session it is not, since what the code had changed would
        be lost or done twice: such a session answers INFRA from then on, until it is released.

        Raises:
            ValueError: a limit is above the sandbox's own.
            SandboxRefused: this machine cannot give the tier that the config asks for.
            RuntimeError: closed, or used from another event loop.
        """
        loop = self._check_use()
        order, limits = self._order(request)
        reason = ""
        for _ in range(self._config.retries + 1):
            try:
                if request.session:
                    return await self._run_in_session(request, order, limits, loop)
                return await self._attempt(request, order, limits, loop)
            except (LostError, SandboxBroken) as fault:
                reason = str(fault)
                if self._closed or request.session:
                    break
        return Execution(ExecutionResult(ExecutionStatus.INFRA, stderr=reason, tier=self._tier()))

    def _tier(self) -> str:
        return self._info.tier if self._info is not None else ""

    def _order(self, request: ExecutionRequest) -> tuple[bytes, Limits]:
        config = self._config

        def limit(name: str, most: int) -> int:
            asked: int | None = getattr(request, name)
            if asked is not None and asked > most:
                raise ValueError(f"{name} = {asked}: this sandbox allows at most {most}; ask for less")
            return most if asked is None else asked

        memory_mb = limit("memory_mb", config.memory_mb)
        cpu_s = request.cpu_s or config.cpu_s or request.timeout_s * self._cores + 1
        order = Order(
            request.code.encode("utf-8", "surrogatepass"),
            cpu_s,
            memory_mb << 20,
            limit("file_mb", config.file_mb) << 20,
            limit("processes", config.processes),
            bool(request.session),
            request.stdin,
            request.files,
        )
        limits = Limits(float(request.timeout_s), limit("output_kb", config.output_kb) << 10, memory_mb << 10)
        return pack_order(order), limits

    async def _attempt(
        self, request: ExecutionRequest, order: bytes, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> Execution:
        child = await self._take_child(loop)
        pipe: int | None = None
        try:
            if request.fetch:
                pipe = self._ask_for_files(child, request.fetch)
            ending, run = await self._run_in(child, order, limits, loop)
            child.kill()  # it may stand at its end, which it is not let go over
            taken, pipe = pipe, None  # who reads it closes it
            files = await self._files(taken, request.fetch)
        finally:
            if pipe is not None:
                os.close(pipe)
        if ending is Ending.LOST:
            raise LostError("the sandbox's keeper or zygote died")
        if ending is Ending.NOT_BEGUN:
            raise LostError("the child died before it got the code")
        return Execution(run.result(self._tier()), *files)

    async def _run_in(
        self, child: Child, order: bytes, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> tuple[Ending, Run]:
        """Raises: LostError where the child is gone already."""
        if self._link is None or child.dropped:
            raise LostError("the child died before it got the code")
        child.slot.limit_memory(limits.memory_kb >> 10)
        run = self._runs[child] = Run(child, limits, loop)
        try:
            run.begin(order)
            ending = await run.ended
        except asyncio.CancelledError:  # which also cancelled ``run.ended``
            run.stop()
            child.kill()
            raise
        finally:
            del self._runs[child]
        if ending is not Ending.NOT_BEGUN:
            self._idle_deaths = 0
        return ending, run

    def _ask_for_files(self, child: Child, names: tuple[str, ...]) -> int:
        if self._link is None or child.dropped:
            raise LostError("the child died before it got the code")
        try:
            return self._link.fetch(child, names, self._config.file_mb << 20)
        except OSError as error:
            raise LostError(f"the sandbox's keeper is gone: {error}") from error

    async def _files(self, pipe: int | None, names: tuple[str, ...]) -> tuple[dict[str, bytes], dict[str, str]]:
        return ({}, {}) if pipe is None else await fetching.receive(pipe, list(names))

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def _run_in_session(
        self, request: ExecutionRequest, order: bytes, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> Execution:
        async with self._sessions.enter(request.session) as session:
            if session.broken:
                raise LostError(session.broken)
            if session.child is None:
                child = await self._take_child(loop)
                if child.slot.listener is None:
                    self.on_child(child)
                    raise SandboxBroken("this machine gives no seccomp notifications, which stateful runs need")
                if self._link is not None:
                    self._link.grow()  # the others keep their number of slots
                session.child = child
            elif not session.child.go_on():
                session.broken = "the session's interpreter died between two runs"
                self._end_child(session)
                raise LostError(session.broken)
            child = session.child
            pipe = self._ask_for_files(child, request.fetch) if request.fetch else None
            try:
                ending, run = await self._run_in(child, order, limits, loop)
                if ending in (Ending.LOST, Ending.NOT_BEGUN):
                    raise LostError("the machine failed under the session's interpreter")
            except (asyncio.CancelledError, LostError) as error:
                if isinstance(error, LostError):
                    session.broken = str(error)
                if pipe is not None:
                    os.close(pipe)
                self._end_child(session)
                raise
            session.last = run.result(self._tier())
            if not child.held or request.fetch:
                self._end_child(session, keep_channel=pipe is not None)
            files = await self._files(pipe, request.fetch)
            if pipe is not None:
                self._retire(child)
            return Execution(session.last, *files)

    async def end_session(self, session: str, fetch: tuple[str, ...] = ()) -> Execution:
        """End a session's interpreter and bring back files from its working folder; ``result`` is its last run's."""
        ExecutionRequest("", 1.0, fetch=fetch)  # checks the names
        found = self._sessions.pop(session)
        last = ExecutionResult(ExecutionStatus.OK, exit_code=0, tier=self._tier())
        if found is None:
            return Execution(last, {}, dict.fromkeys(fetch, "there is no such session"))
        async with found.lock:
            child = found.child
            last = found.last or last
            if child is None or child.dropped or not fetch:
                self._end_child(found)
                return Execution(last, {}, dict.fromkeys(fetch, "the session's interpreter has ended"))
            try:
                pipe = self._ask_for_files(child, fetch)
            except LostError as error:
                return Execution(last, {}, dict.fromkeys(fetch, str(error)))
            self._end_child(found, keep_channel=True)
            files = await self._files(pipe, fetch)
            self._retire(child)
            return Execution(last, *files)

    def release(self, session: str) -> None:
        """End a session's interpreter; unknown sessions are ignored."""
        found = self._sessions.pop(session)
        if found is not None:
            self._end_child(found)

    def _end_child(self, session: Session, keep_channel: bool = False) -> None:
        child, session.child = session.child, None
        if child is None:
            return
        if keep_channel:
            child.kill()
        else:
            self._end_interpreter(child)

    def _end_interpreter(self, child: Child) -> None:
        child.kill()
        self._retire(child)  # the slot was made for the session

    def _retire(self, child: Child) -> None:
        if self._link is not None:
            self._link.retire(child.slot)

    # -- children ------------------------------------------------------------------------------------------------------

    async def _take_child(self, loop: asyncio.AbstractEventLoop) -> Child:
        """An idle child, when it is this call's turn.

        Raises:
            LostError: zygotes keep dying, or the sandbox was closed.
            SandboxBroken: the zygote cannot be started.
        """
        for _ in range(QUEUE_LOSSES):
            if self._closed:
                raise LostError("the sandbox was closed")
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
            except LostError:
                continue
            except asyncio.CancelledError:
                if turn.cancelled():
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(turn)
                elif turn.exception() is None and not turn.result().dropped:
                    self.on_child(turn.result())
                raise
        raise LostError("the sandbox's zygote keeps dying")

    # -- what the link tells -------------------------------------------------------------------------------------------

    def on_child(self, child: Child) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(child)
                return
        self._idle.append(child)

    def on_ended(self, child: Child, code: int) -> None:
        run = self._runs.get(child)
        if run is None:
            child.kill()
            return
        run.on_ended(code)

    def on_exit(self, child: Child, packet: Packet) -> None:
        run = self._runs.get(child)
        if run is not None:
            run.on_exit(packet)
        elif child in self._idle:
            self._idle.remove(child)
            self._count_idle_death()
        self._sessions.on_exit(child)

    def _count_idle_death(self) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > IDLE_DEATHS * self.workers and self._link is not None:
            self._link.give_up("the sandbox's children die before they get code")

    def on_gone(self, child: Child, reason: str) -> None:
        run = self._runs.get(child)
        if run is not None:
            run.on_lost()
        elif child in self._idle:
            self._idle.remove(child)
        self._sessions.on_lost(child, reason)

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
                turn.set_exception(LostError(reason))

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Kill everything that still runs (its callers get INFRA) and leave no process, descriptor or folder behind.

        May be called again, and from another event loop where the first one is gone."""
        self._closed = True
        self._sessions.close()
        link, self._link = self._link, None
        if self._loop is not None and not self._loop.is_closed():
            self._forget("the sandbox was closed")
        if link is not None:
            await link.close()
