"""Stateful sessions as the supervisor keeps them: whose interpreter is whose, who waits for it, and when it has idled
for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from retool.sandbox.link import Child
from retool.types import ExecutionResult


@dataclass(eq=False)
class Session:
    child: Child | None = None
    """Its interpreter; None before the first run, and after a run that ended it (a deadline, an exit)."""
    broken: str = ""
    """Why the machine lost its state; such a session runs nothing more."""
    last: ExecutionResult | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One run at a time, in the order in which they came."""
    idle: asyncio.TimerHandle | None = None
    busy: int = 0
    """Calls that run or wait."""


class Sessions:
    def __init__(self, idle_s: float, most_running: int, end: Callable[[Child], None]) -> None:
        self._idle_s = idle_s
        self._end_child = end
        self._all: dict[str, Session] = {}
        self._by_child: dict[Child, Session] = {}
        self._room = asyncio.Semaphore(most_running)
        """Interpreters that wait for code cost memory, those that run cost time: only the latter are bounded."""
        self.waiting = 0
        """Calls that wait for their session, or for room."""

    @asynccontextmanager
    async def enter(self, name: str) -> AsyncIterator[Session]:
        """The session called ``name``, made if it is new, for one run."""
        session = self._all.setdefault(name, Session())
        session.busy += 1
        if session.idle is not None:
            session.idle.cancel()
        self.waiting += 1
        entered = False
        try:
            async with session.lock, self._room:
                self.waiting -= 1
                entered = True
                try:
                    yield session
                finally:
                    if session.child is not None:
                        self._by_child[session.child] = session
        finally:
            self.waiting -= 0 if entered else 1
            session.busy -= 1
            if self._all.get(name) is not session:
                self._end(session)  # released meanwhile
            elif not session.busy:
                loop = asyncio.get_running_loop()
                session.idle = loop.call_later(self._idle_s, self._expire, name)

    def pop(self, name: str) -> Session | None:
        """Forget the session; who holds it ends its interpreter."""
        session = self._all.pop(name, None)
        if session is not None and session.idle is not None:
            session.idle.cancel()
        return session

    def _expire(self, name: str) -> None:
        session = self._all.get(name)
        if session is not None and not session.busy:
            self._end(self._all.pop(name))

    def _end(self, session: Session) -> None:
        child, session.child = session.child, None
        if child is not None:
            self._end_child(child)

    def on_exit(self, child: Child) -> None:
        """The interpreter has ended by itself, or was ended."""
        session = self._by_child.pop(child, None)
        if session is not None and session.child is child and not session.busy:
            session.broken = session.broken or "the session's interpreter died between two runs"

    def on_lost(self, child: Child, reason: str) -> None:
        session = self._by_child.pop(child, None)
        if session is not None and session.child is child:
            session.broken = reason

    def close(self) -> None:
        for session in self._all.values():
            if session.idle is not None:
                session.idle.cancel()
        self._all.clear()
        self._by_child.clear()
