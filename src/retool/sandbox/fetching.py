"""Files that come back from a run, as the supervisor reads them from a keeper's pipe."""

from __future__ import annotations

import asyncio
import os

from retool.sandbox import wire

PATIENCE_S = 10.0
"""The keeper first kills what is left of the run, then reads from a file system in memory."""
_CHUNK = 1 << 16


async def receive(pipe: int, names: list[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Contents by name, and by name the reason for those that could not be brought. Closes the pipe."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    done: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        try:
            chunk = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return
        data.extend(chunk)
        if not chunk and not done.done():
            done.set_result(None)

    os.set_blocking(pipe, False)
    loop.add_reader(pipe, read)
    try:
        await asyncio.wait_for(done, PATIENCE_S)
    except TimeoutError:
        pass  # what is there is unpacked; the rest has its reason
    finally:
        loop.remove_reader(pipe)
        os.close(pipe)
    return wire.unpack_files(bytes(data), names)
