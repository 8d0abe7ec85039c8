"""What the two sandboxes have in common: each belongs to one event loop, and is closed once."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self


class OneLoopSandbox:
    """Base of a sandbox that is used from the first loop that used it, until it is closed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def start(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_use(self) -> asyncio.AbstractEventLoop:
        """The running loop.

        Raises:
            RuntimeError: closed, or used from another event loop.
        """
        loop = asyncio.get_running_loop()
        name = type(self).__name__
        if self._closed:
            raise RuntimeError(f"this sandbox is closed: make a new {name}")
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError(f"this sandbox belongs to another event loop: make a new {name} in this one")
        return loop
