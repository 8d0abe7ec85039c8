"""One zygote process as the supervisor sees it: start it, hear of its children, have them killed, end it.

A link lives as long as its zygote. When the zygote is gone, ``on_lost`` is called once and the link is of no more use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, Protocol

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox import folders, wire

START_S = 120.0
"""Patience with the imports of the preload list: scipy and sympy take seconds on a cold disk and a busy machine."""
END_S = 30.0
"""Patience with a zygote that was told to end; it needs milliseconds, unless programs wrote a lot to a slow disk."""
_POLL_S = 0.002
_SWEEP_ROUNDS = 20
_MARK = "RETOOL_SANDBOX"
"""Environment variable that marks a zygote and all below it."""
_ONE_THREAD = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS")


class Child:
    """A jailed process that waits for code, or runs it. Holds three descriptors until ``drop``."""

    def __init__(self, number: int, pid: int, descriptors: list[int]) -> None:
        self.number = number
        self.pid = pid
        self.code = socket.socket(fileno=descriptors[0])
        self.code.setblocking(False)
        self.outputs = (descriptors[1], descriptors[2])
        for descriptor in self.outputs:
            os.set_blocking(descriptor, False)
        self.kill_acknowledged = False
        self.dropped = False

    def drop(self) -> None:
        """Close its descriptors; a child that got no code yet exits then."""
        if not self.dropped:
            self.dropped = True
            self.code.close()
            for descriptor in self.outputs:
                os.close(descriptor)


class Listener(Protocol):
    """Whom a link tells what happened."""

    def on_child(self, child: Child) -> None: ...

    def on_exit(self, child: Child, packet: wire.Packet) -> None: ...

    def on_lost(self, reason: str) -> None: ...


class Link:
    def __init__(self, listener: Listener, config: SandboxConfig, workers: int) -> None:
        self._listener = listener
        self._config = config
        self._workers = workers
        self._children: dict[int, Child] = {}
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._mark = uuid.uuid4().hex
        self._outbox: list[bytes] = []
        self._lost = False
        self._root = ""
        self._control: socket.socket
        self._process: subprocess.Popen[bytes]
        self._loop: asyncio.AbstractEventLoop

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> dict[str, Any]:
        """Start the zygote; what it says of itself: ``loaded``, ``skipped`` modules and jail ``steps``.

        Raises:
            SandboxBroken: it did not come up.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        try:
            with theirs:
                self._launch(theirs.fileno())
        except OSError as error:
            self._control.close()
            folders.wipe(self._root)
            raise SandboxBroken(f"the sandbox cannot start its zygote: {error}") from error
        try:
            return await asyncio.wait_for(self._ready, START_S)
        except TimeoutError:
            await self.close(at_once=True)
            raise SandboxBroken(f"the sandbox's zygote was not ready within {START_S:g} s") from None
        except BaseException:
            await self.close(at_once=True)
            raise

    def _launch(self, control: int) -> None:
        self._root = tempfile.mkdtemp(prefix="retool-sandbox-")
        script = str(Path(__file__).with_name("zygote.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-s", "-P", "-S", script, str(control)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._root,
            env=self._environment(),
            pass_fds=[control],
            start_new_session=True,  # Ctrl-C is for the trainer, which then ends the zygote itself
        )
        self._loop.add_reader(self._control, self._hear)
        settings = {
            "workers": self._workers,
            "memory_mb": self._config.memory_mb,
            "preload": self._config.preload,
            "root": self._root,
            "parent": os.getpid(),
            "paths": site_packages(),
        }
        self._send(wire.Packet(wire.Kind.START, body=json.dumps(settings).encode()))

    def _environment(self) -> dict[str, str]:
        """All that user code gets to see of an environment: nothing of the trainer's but where libraries are."""
        path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"])
        environment = {
            "PATH": path,
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            # The order of a set of strings shall be the same in every run, or rollouts could not be repeated.
            "PYTHONHASHSEED": "0",
            # Each arena of malloc reserves 64 MiB of address space, which is what the memory limit counts.
            "MALLOC_ARENA_MAX": "2",
            _MARK: self._mark,
        }
        environment |= {f"{name}_NUM_THREADS": "1" for name in _ONE_THREAD}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        return environment

    # -- talking -------------------------------------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        """Have the zygote kill a child and its group; the answer is a later ``on_exit``."""
        if not self._lost:
            self._send(wire.Packet(wire.Kind.KILL, child.number))

    def _send(self, packet: wire.Packet) -> None:
        self._outbox.append(wire.pack(packet))
        self._flush()

    def _flush(self) -> None:
        while self._outbox and not self._lost:
            try:
                self._control.send(self._outbox[0])
            except BlockingIOError:
                # The zygote waits for us to read first.
                self._loop.call_later(_POLL_S, self._flush)
                return
            except OSError:
                return  # the reader finds out what happened
            del self._outbox[0]

    def _hear(self) -> None:
        # As much as is there, so that an ending is known before the deadline's timer is looked at.
        while not self._lost:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, wire.MAX_PACKET, 3)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose("the sandbox's zygote died")
                return
            packet = wire.unpack(data)
            if packet.kind is wire.Kind.CHILD:
                child = Child(packet.child, packet.number, descriptors)
                self._children[child.number] = child
                self._listener.on_child(child)
            elif packet.kind is wire.Kind.READY:
                self._take_ready(json.loads(packet.body))
            else:
                self._hear_of_child(packet)

    def _hear_of_child(self, packet: wire.Packet) -> None:
        child = self._children.get(packet.child)
        if child is None:
            return
        if packet.kind is wire.Kind.ACK:
            child.kill_acknowledged = True
        elif packet.kind is wire.Kind.EXIT:
            del self._children[packet.child]
            self._listener.on_exit(child, packet)
            child.drop()

    def _take_ready(self, said: dict[str, Any]) -> None:
        if self._ready is not None and not self._ready.done():
            if "error" in said:
                self._ready.set_exception(SandboxBroken(f"the sandbox cannot jail code here: {said['error']}"))
            else:
                self._ready.set_result(said)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        """The zygote is gone or given up: forget it, and leave none of its descendants."""
        if self._lost:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        status = self._process.wait()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(SandboxBroken(f"the sandbox's zygote ended at start with exit code {status}"))
        # Before the children's descriptors close, whoever reads them must stop.
        self._listener.on_lost(reason)
        self._detach()
        self._clean()

    def give_up(self, reason: str) -> None:
        """Kill a zygote that does not answer any more."""
        self._lose(reason)

    def _detach(self) -> None:
        self._lost = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._control)
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(SandboxBroken("the sandbox was closed while it started"))
        self._control.close()
        for child in self._children.values():
            child.drop()
        self._children.clear()

    async def close(self, at_once: bool = False) -> None:
        """End the zygote and all below it; ``at_once`` does not ask it first."""
        if self._lost:
            return
        self._detach()
        deadline = self._loop.time() + (0.0 if at_once else END_S)
        try:
            while self._process.poll() is None and self._loop.time() < deadline:
                await asyncio.sleep(_POLL_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            if self._process.wait() != 0:
                self._clean()

    def _clean(self) -> None:
        """After a zygote that could not tidy up: its descendants and its folder."""
        for _ in range(_SWEEP_ROUNDS):
            if not _kill_marked(f"{_MARK}={self._mark}".encode()):
                break
        folders.wipe(self._root)


def _kill_marked(mark: bytes) -> bool:
    """Kill every process whose environment at its start (or its ancestor's) held ``mark``; whether there was one.

    A process that was started with a changed environment is not found."""
    found = False
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            # Opened before it is looked at: the number cannot pass to another process in between.
            handle = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    found = True
        except OSError:
            pass
        finally:
            os.close(handle)
    return found


def site_packages() -> list[str]:
    """Where this interpreter finds installed packages."""
    names = ("site-packages", "dist-packages")
    return [path for path in sys.path if os.path.basename(path) in names and os.path.isdir(path)]
