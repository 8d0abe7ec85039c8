"""The sandbox on a cluster: one pool of interpreters a node, in a Ray actor that all the node's workers share.

``NodeSandbox`` is what a trajectory holds, ``Station`` what a worker process holds (one connection for all of its
trajectories), ``NodePool`` the actor. Code never leaves the node. The actor belongs to the process that made it, and so
dies with its job; when it dies alone, Ray starts it again, and when its maker dies, another worker makes a new one.

What an actor's death costs: its running calls are answered INFRA once it answers again, sessions that it held are
answered INFRA until they are released. Not covered: code that a dead worker process had asked for runs on to its
deadline, and a dead worker's sessions stay until they have been idle for ``sandbox.session_idle_s``.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from retool.config import SandboxConfig
from retool.errors import SandboxBroken, SandboxRefused
from retool.protocols import Sandbox
from retool.sandbox import LocalSandbox
from retool.sandbox.base import OneLoopSandbox
from retool.sandbox.choose import open_sandbox
from retool.sandbox.fusion import infra
from retool.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_AGAIN_S = 0.2
"""Between two tries to reach an actor that is being restarted."""
_LAST_WORDS_S = 0.5
"""From the actor's last answer to its exit: the answer has to be sent."""
_MAX_CALLS = 100_000
"""Calls that the actor takes at a time. The pool has its own line; Ray's own (1,000) would hold up pings and
releases behind waiting code."""
_ENV = {"RAY_kill_child_processes_on_worker_exit": "0"}
"""Else Ray SIGKILLs the pool's launcher with the actor, and nobody removes its folder and control groups. Without it
the launcher notices its parent's death and tidies up."""
_SHOWN_CHARS = 300


class NodePool:
    """The actor: a ``LocalSandbox`` in an event loop of its own."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._pool = LocalSandbox(config)
        self._life = uuid.uuid4().hex  # another one after each restart: what sessions must not outlive

    async def start(self, config: SandboxConfig) -> str:
        """This process's name, once it can run code.

        Raises:
            SandboxRefused: this node cannot give the tier, or the job's pool has another config.
            SandboxBroken: nothing can be run; the process exits, and Ray starts it again.
        """
        if config != self._config:
            raise SandboxRefused(
                "sandbox: this job's sandbox was opened with other settings: use the same ones everywhere"
            )
        await self._start()
        return self._life

    async def _start(self) -> None:
        try:
            await self._pool.start()
        except SandboxBroken:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
            raise

    async def execute(self, request: ExecutionRequest, life: str) -> tuple[str, ExecutionResult]:
        """This process's name, and what came of the request. ``life``: the process that holds the session."""
        if life and life != self._life:
            return self._life, infra("the session's interpreter was lost with the sandbox's process")
        result = await self._pool.execute(request.code, request.timeout_s, session=request.session)
        if result.status is ExecutionStatus.INFRA:
            await self._start()  # where no zygote comes up any more, only a new process can help
        return self._life, result

    def release(self, session: str) -> None:
        self._pool.release(session)

    async def ping(self) -> tuple[int, int]:
        """Programs that wait, and that run; answered by the event loop that hands out code."""
        return self._pool.waiting, self._pool.running


@dataclass(frozen=True)
class Patience:
    """How long a station waits for what."""

    ping_s: float = 5.0
    """Between two pings of the actor's event loop."""
    answer_s: float = 10.0
    """After which a ping is missed. It runs no code: a full pool answers in milliseconds."""
    misses: int = 3
    """In a row, before the actor is killed."""
    recover_s: float = 60.0
    """How long a call waits for a dead actor to come back: a new process and its imports take 2 to 20 s."""
    start_s: float = 180.0
    """For an actor's first answer; its zygote alone may take ``retool.sandbox.link.START_S`` = 120 s."""
    starts: int = 3
    """In a row that may fail before the node is given up."""


class Station:
    """One process's connection to its node's actor: finds or makes it, watches it, waits for it, counts. It belongs to
    the event loop in which it was first used, and ends with it."""

    def __init__(
        self,
        config: SandboxConfig,
        patience: Patience = Patience(),
        pool: type[NodePool] = NodePool,
    ) -> None:
        self._config = config
        self._patience = patience
        self._pool = pool
        self._actor: Any = None
        self._life = ""
        self._up = False
        """Whether the actor answered when it was last asked."""
        self._fault: SandboxBroken | SandboxRefused | None = None
        """Why this node is given up."""
        self._reaching: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.counts = dict.fromkeys(("calls", "infra", "restarts", "kills", "waiting", "running"), 0)
        """What this process saw: its calls and how many were answered INFRA; the actor's restarts and how many of them
        this process caused (kills, it did not answer pings); of the whole node, at the last ping, the programs that
        wait and run. All of a node's processes see the same restarts: take their largest."""

    async def open(self) -> None:
        """Wait until the actor answers. Raises as ``NodeSandbox.start`` does."""
        try:
            await self._reach(self._patience.start_s)
        except TimeoutError:
            seconds = self._patience.start_s
            raise SandboxBroken(f"the node's sandbox did not answer within {seconds:g} s; see Ray's logs") from None

    async def _reach(self, limit_s: float) -> None:
        """Raises: SandboxRefused, SandboxBroken, TimeoutError."""
        _check_ray()
        if self._up:
            return
        if self._fault is not None:
            raise self._fault
        if self._reaching is None or self._reaching.done():
            self._reaching = asyncio.create_task(self._connect())
            self._reaching.add_done_callback(_look_at)
        await asyncio.wait_for(asyncio.shield(self._reaching), limit_s)

    async def _connect(self) -> None:
        """Until the actor answers, however often it is started and made again meanwhile."""
        failed = 0
        deadline = time.monotonic() + self._patience.start_s * self._patience.starts
        while True:
            _check_ray()
            reason = ""
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._get_or_make)
                life = await asyncio.wait_for(self._actor.start.remote(self._config), self._patience.start_s)
            except RayTaskError as error:
                if isinstance(error.cause, SandboxRefused):
                    self._fault = SandboxRefused(str(error.cause))
                    raise self._fault from None
                if not isinstance(error.cause, SandboxBroken):
                    raise
                reason = str(error.cause)
            except TimeoutError:
                reason = f"no answer within {self._patience.start_s:g} s"
                await asyncio.to_thread(ray.kill, self._actor, no_restart=False)
            except ActorDiedError as error:  # for good: its maker has died, or it could not be made
                self._actor = None
                reason = str(error).rstrip().rpartition("\n")[2] if error.actor_init_failed else ""
            except (RayError, ValueError):  # being restarted; ValueError: the name went while it was looked up
                pass
            else:
                break
            failed += bool(reason)
            if failed >= self._patience.starts or time.monotonic() > deadline:
                why = _line(reason) or "its process keeps dying"
                self._fault = SandboxBroken(f"the node's sandbox cannot run anything: {why}")
                raise self._fault
            await asyncio.sleep(_AGAIN_S)
        self.counts["restarts"] += bool(self._life) and life != self._life
        self._life, self._up = life, True
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
            self._watching.add_done_callback(self._unlist)

    def _get_or_make(self) -> Any:
        context = ray.get_runtime_context()
        node = context.get_node_id()
        actor = ray.remote(self._pool).options(
            name=f"retool_sandbox_{node}",
            namespace=f"retool-{context.get_job_id()}",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,  # code that may have run is the rollout's to run again
            max_concurrency=_MAX_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": _ENV},
        )
        return actor.remote(self._config)

    def _unlist(self, watching: asyncio.Task[None]) -> None:
        """Where the event loop ends, let go of the actor, which dies if this process made it."""
        if watching.cancelled():
            for key in [key for key, station in _stations.items() if station is self]:
                del _stations[key]
        _look_at(watching)

    async def _watch(self) -> None:
        misses = 0
        while self._fault is None:
            await asyncio.sleep(self._patience.ping_s)
            _check_ray()
            if not self._up:
                misses = 0
                await self._reach(self._patience.start_s * self._patience.starts)
                continue
            try:
                misses = 0 if await self._ping() else misses + 1
                if misses >= self._patience.misses:
                    self._up = False
                    self.counts["kills"] += 1
                    await asyncio.to_thread(ray.kill, self._actor, no_restart=False)
            except RayError:
                self._up = False

    async def _ping(self) -> bool:
        """Raises: RayError: the actor is not there."""
        # Ray's own thread sets it: an answer that came while this event loop was busy is no miss.
        answer = self._actor.ping.remote().future()
        await asyncio.wait([asyncio.wrap_future(answer)], timeout=self._patience.answer_s)
        if not answer.done():
            return False
        self.counts["waiting"], self.counts["running"] = answer.result()
        return True

    async def execute(self, request: ExecutionRequest, life: str, running: set[Any]) -> tuple[str, ExecutionResult]:
        """The process that ran the request (empty: none did to the end), and what came of it. ``running`` holds the
        call's reference meanwhile. Cancelled, it cancels the run. Raises as ``NodeSandbox.start`` does."""
        try:
            await self._reach(self._patience.recover_s)
        except TimeoutError:
            return "", infra(f"the node's sandbox did not answer within {self._patience.recover_s:g} s")
        asked = self._life
        reference = self._actor.execute.remote(request, life)
        running.add(reference)
        try:
            answer: tuple[str, ExecutionResult] = await reference
            return answer
        except asyncio.CancelledError:
            _cancel(reference)
            raise
        except TaskCancelledError:
            return "", infra("the sandbox was closed")
        except RayTaskError as error:
            if isinstance(error.cause, SandboxRefused):
                raise SandboxRefused(str(error.cause)) from None
            if not isinstance(error.cause, (SandboxBroken, OSError, MemoryError)):
                raise
            reason = _line(error.cause)
        except RayError as error:
            reason = _line(error)
        finally:
            running.discard(reference)
        if asked == self._life:
            self._up = False
        try:  # so that whoever tries again at once meets a sandbox that works
            await self._reach(self._patience.recover_s)
        except TimeoutError:
            reason += f"; it did not come back within {self._patience.recover_s:g} s"
        return "", infra(reason)

    def release(self, session: str) -> None:
        if self._up and ray.is_initialized():
            self._actor.release.options(num_returns=0).remote(session)


_stations: dict[tuple[asyncio.AbstractEventLoop, str], Station] = {}


def _station_of(config: SandboxConfig) -> Station:
    """The running event loop's."""
    key = asyncio.get_running_loop(), config.model_dump_json()
    return _stations.get(key) or _stations.setdefault(key, Station(config))


class NodeSandbox(OneLoopSandbox):
    """The node's sandbox as a worker process sees it (``retool.protocols.Sandbox``).

    A fault of the actor is ``ExecutionStatus.INFRA``, returned when the actor answers again (or after a minute). A
    session that was in use when the actor died answers INFRA until it is released: to go on in a fresh interpreter
    would be another program. Use it from one event loop.

    Args:
        station: another connection than the event loop's own.
    """

    def __init__(self, config: SandboxConfig, *, station: Station | None = None) -> None:
        super().__init__()
        self._config = config
        self._given_station = station
        self._running: set[Any] = set()
        self._lives: dict[str, str] = {}
        """Of each session, the actor's process that holds it."""

    @property
    def _station(self) -> Station:
        return self._given_station or _station_of(self._config)

    async def start(self) -> None:
        """Find or make the node's actor, and wait until it can run code.

        Raises:
            SandboxRefused: this node cannot give the tier, or the job's pool was started with another config.
            SandboxBroken: nothing can be run on this node.
        """
        self._check_use()
        await self._station.open()

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        """Run ``code`` as a Python program; see ``retool.protocols.Sandbox``.

        Raises:
            ValueError: ``timeout_s`` is not a positive, finite number.
            SandboxRefused, SandboxBroken: as ``start`` does.
            RuntimeError: closed, or used from another event loop.
        """
        self._check_use()
        request = ExecutionRequest(code, timeout_s, session=session)
        counts = self._station.counts
        counts["calls"] += 1
        held = self._lives.setdefault(session, "") if session else ""
        life, result = await self._station.execute(request, held, self._running)
        counts["infra"] += result.status is ExecutionStatus.INFRA
        if session and not (held and life):
            self._lives[session] = life or "lost"
        return result

    def release(self, session: str) -> None:
        """End a session's interpreter; unknown sessions are ignored."""
        if self._lives.pop(session, None) is not None:
            self._station.release(session)

    async def close(self) -> None:
        """Kill what this client still runs (its callers get INFRA), and end its sessions; the pool lives on."""
        self._closed = True
        if self._loop is asyncio.get_running_loop():
            for reference in self._running:
                _cancel(reference)
            for session in list(self._lives):
                self.release(session)

    def stats(self) -> dict[str, int]:
        """A copy of this process's ``Station.counts``."""
        return dict(self._station.counts)


async def open_node_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox that a config means for this node's workers: the node's own, or the service at ``config.url``. It has
    started; who opened it closes it. Raises as ``retool.sandbox.choose.open_sandbox`` does."""
    if config.url:
        return await open_sandbox(config)
    sandbox = NodeSandbox(config)
    await sandbox.start()
    return sandbox


def _check_ray() -> None:
    """Raises: SandboxBroken: Ray was shut down, and would start a cluster of its own if it were asked for anything."""
    if not ray.is_initialized():
        raise SandboxBroken("the node's sandbox is gone: Ray was shut down")


def _cancel(reference: Any) -> None:
    if ray.is_initialized():
        ray.cancel(reference)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARS]


def _look_at(task: asyncio.Task[None]) -> None:
    """Its error is known to those who waited for it."""
    if not task.cancelled():
        task.exception()
