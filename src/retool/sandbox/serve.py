"""From a sandbox to a service on a port: bind, run until told to stop, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aiohttp import web

from retool.errors import UserError
from retool.sandbox.server import SERVICE, ServedSandbox, ServerConfig, Service, make_app
from retool.sandbox.tier import SandboxInfo

_BACKLOG = 1024
_LAST_ANSWERS_S = 2.0
"""How long the answers to runs that the drain cut off may take to be written."""


class Stop:
    """Told once: finish what runs. Told twice: end it at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.urged = asyncio.Event()

    def __call__(self) -> None:
        (self.urged if self.asked.is_set() else self.asked).set()


@dataclass
class Listener:
    """A service that answers on a port."""

    service: Service
    runner: web.AppRunner
    site: web.SockSite
    port: int

    async def close(self) -> None:
        await self.runner.cleanup()


async def serve(
    sandbox: ServedSandbox, config: ServerConfig, *, announce: Callable[[str], None], stop: Stop | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, or until ``stop`` is called; then refuse what is new, finish what runs within
    ``config.drain_s``, and close the sandbox.

    Raises:
        UserError: the address cannot be used, or is open to others without a token.
        SandboxRefused, SandboxBroken: of the sandbox's start.
    """
    check_exposure(config)
    sock = bind(config)
    stopping = stop or Stop()
    try:
        info = await sandbox.start()
        listener = await listen(sandbox, config, sock)
        with contextlib.nullcontext() if stop is not None else _on_signals(stopping):
            try:
                # What is there now stays: the collector need not look at it again and again.
                gc.collect()
                gc.freeze()
                announce(greeting(sandbox, config, listener.port, info))
                await stopping.asked.wait()
                await _drain(listener, config.drain_s, stopping)
            finally:
                # In this order: what the drain cut off is answered before its connection is closed.
                await sandbox.close()
                await listener.close()
    finally:
        await sandbox.close()
        sock.close()


async def listen(sandbox: ServedSandbox, config: ServerConfig, sock: socket.socket) -> Listener:
    """Answer on a bound socket. The sandbox has started."""
    app = make_app(sandbox, config)
    service = app[SERVICE]
    service.meters.started(service.tier, sandbox.workers)
    if config.access_log:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=logging.getLogger("aiohttp.access") if config.access_log else None,
        shutdown_timeout=_LAST_ANSWERS_S,
    )
    await runner.setup()
    site = web.SockSite(runner, sock, backlog=_BACKLOG)
    await site.start()
    return Listener(service, runner, site, sock.getsockname()[1])


async def _drain(listener: Listener, limit_s: float, stop: Stop) -> None:
    listener.service.draining = True
    await listener.site.stop()
    waits = [asyncio.ensure_future(event.wait()) for event in (listener.service.idle, stop.urged)]
    await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


@contextlib.contextmanager
def _on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop`` while this is open; what handled them before does so again after it."""
    loop = asyncio.get_running_loop()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        loop.add_signal_handler(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)


# -- the address -------------------------------------------------------------------------------------------------------


def check_exposure(config: ServerConfig) -> None:
    """Raises: UserError where others could reach the service and nothing is asked of them."""
    if not config.token and not is_loopback(config.host):
        raise UserError(
            f"--host = {config.host!r}: other machines could run code here; give --token or set RETOOL_SANDBOX_TOKEN"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the config's address that does not listen yet: a wrong address shows before the sandbox starts, and
    no client gets in before it has.

    Raises:
        UserError: there is no such address, or it is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host = {config.host!r}: {reason}; give an address of this machine") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(
            f"--host = {config.host!r}, --port = {config.port}: {error.strerror}; choose another port, 0 for any that "
            "is free, or an address of this machine"
        ) from None
    sock.setblocking(False)
    return sock


def greeting(sandbox: ServedSandbox, config: ServerConfig, port: int, info: SandboxInfo) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host or "0.0.0.0"
    url = f"http://{host}:{port}"
    guard = "" if config.token else ", no token"
    return (
        f"retool sandbox: {url}{guard}; tier {info.tier}, {sandbox.workers} workers, layers: {', '.join(info.layers)}; "
        f"metrics at {url}/metrics"
    )
