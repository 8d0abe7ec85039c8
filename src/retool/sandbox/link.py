"""One zygote and its slots as the supervisor sees them: start them, hear of their children, have them killed, end them.

A link lives as long as its zygote. When the zygote is gone, ``on_lost`` is called once and the link is of no more use.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import uuid
from pathlib import Path
from typing import Any, Protocol

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox import cgroups, folders, seccomp, wire
from retool.sandbox.jail import RESTRICTED

START_S = 120.0
"""Patience with the imports of the preload list: scipy and sympy take seconds on a cold disk and a busy machine."""
END_S = 30.0
"""Patience with a launcher that was told to end; it needs milliseconds, unless programs wrote a lot to a slow disk."""
_LOSE_S = 5.0
"""The same for a launcher whose zygote has died; the event loop waits meanwhile."""
BARREN_SLOTS = 3
"""Slots per worker that may die in a row without ever having had a child, before the zygote is given up."""
_POLL_S = 0.002
_ONE_THREAD = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS")


class Slot:
    """One keeper and the descriptors that go with it."""

    def __init__(self, number: int, channel: socket.socket, config: SandboxConfig, groups: str) -> None:
        self.number = number
        self.channel = channel
        channel.setblocking(False)
        self.listener: int | None = None
        self.child: Child | None = None
        self.has_borne = False
        """Whether it has ever had a child."""
        self.memory_mb = config.memory_mb
        self._file_mb = config.file_mb
        self._group = os.path.join(groups, str(number)) if groups else ""
        self._oom_kills = 0

    def limit_memory(self, memory_mb: int) -> None:
        """For all processes of the next run together, where there are control groups."""
        if self._group and memory_mb != self.memory_mb:
            cgroups.set_memory(self._group, cgroups.memory_bytes(memory_mb, self._file_mb))
            self.memory_mb = memory_mb

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed for want of memory in this slot since this was asked last."""
        before, self._oom_kills = self._oom_kills, cgroups.oom_kills(self._group) if self._group else 0
        return self._oom_kills > before


class Child:
    """A jailed process that waits for code, or runs it. Holds descriptors until ``drop``."""

    def __init__(self, slot: Slot, descriptors: list[int]) -> None:
        self.slot = slot
        self._handle, self.code, *outputs = descriptors
        """``code``: the pipe into which its code goes."""
        self.outputs = outputs
        for descriptor in descriptors[1:]:
            os.set_blocking(descriptor, False)
        self.held = 0
        """Id of the system call at which the kernel holds it; 0 where it does not."""
        self.dropped = False

    def kill(self) -> None:
        if not self.dropped:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def read_nothing(self) -> bool:
        """Whether all that was written for it still lies in the pipe: it was never jailed."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self.code, termios.FIONREAD, waiting)
        return waiting[0] > 0

    def go_on(self) -> bool:
        """Give one that waits for more code a new pipe for it (``code``); False where it is gone."""
        listener, held = self.slot.listener, self.held
        if listener is None or not held:
            return False
        read, write = os.pipe()
        try:
            number = seccomp.add_fd(listener, held, read)
            if number is None or not seccomp.answer(listener, held, value=number):
                os.close(write)
                return False
        finally:
            os.close(read)
        os.set_blocking(write, False)
        self.held = 0
        os.close(self.code)
        self.code = write
        return True

    def drop(self) -> None:
        """Close its descriptors; a child that got no code yet exits then."""
        if not self.dropped:
            self.dropped = True
            for descriptor in (self._handle, self.code, *self.outputs):
                os.close(descriptor)


class Listener(Protocol):
    """Whom a link tells what happened."""

    def on_child(self, child: Child) -> None: ...

    def on_ended(self, child: Child, code: int) -> None:
        """The child's own process stands at its end, with this exit code; the kernel holds it there."""
        ...

    def on_exit(self, child: Child, packet: wire.Packet) -> None: ...

    def on_gone(self, child: Child, reason: str) -> None:
        """Its keeper died, and so did the child; nobody knows how."""
        ...

    def on_lost(self, reason: str) -> None: ...


class Link:
    def __init__(self, listener: Listener, config: SandboxConfig, workers: int) -> None:
        self._listener = listener
        self._config = config
        self._workers = workers
        self._slots: dict[int, Slot] = {}
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._mark = uuid.uuid4().hex
        self._outbox: list[bytes] = []
        self._lost = False
        self._root = ""
        self._groups = ""
        self._notifies = True
        """Whether the kernel tells of a child's end before it has taken the child down."""
        self._listener_each = False
        """Whether that is each child's own business, or its slot's."""
        self._barren_slots = 0
        """That died in a row without ever having had a child."""
        self.zygote_pid = 0
        self._control: socket.socket
        self._process: subprocess.Popen[bytes]
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> dict[str, Any]:
        """Start the zygote; what it says of itself: ``loaded``, ``skipped`` modules, ``layers`` and ``missing`` ones.

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
            self._lost = True  # nothing is left to close
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
        os.chmod(self._root, 0o711)  # slots of other users must get through to their own folders
        script = str(Path(__file__).with_name("launch.py"))
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
        config = self._config
        settings = {
            "workers": self._workers,
            "memory_mb": config.memory_mb,
            "file_mb": config.file_mb,
            "max_files": config.max_files,
            "processes": config.processes,
            "preload": config.preload,
            "mark": self._mark[:12],
            "root": self._root,
            "parent": os.getpid(),
            "paths": site_packages(),
        }
        self._send(wire.Packet(wire.Kind.START, body=json.dumps(settings).encode()))

    def _environment(self) -> dict[str, str]:
        """All that user code gets to see of an environment: nothing of the trainer's but where libraries are."""
        environment = {
            "PATH": os.path.dirname(sys.executable),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            # The order of a set of strings shall be the same in every run, or rollouts could not be repeated.
            "PYTHONHASHSEED": "0",
            # Each arena of malloc reserves 64 MiB of address space, which is what the memory limit counts.
            "MALLOC_ARENA_MAX": "2",
            "RETOOL_SANDBOX": self._mark,
        }
        environment |= {f"{name}_NUM_THREADS": "1" for name in _ONE_THREAD}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        return environment

    # -- talking -------------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Have one more slot made."""
        self._send(wire.Packet(wire.Kind.GROW))

    def retire(self, slot: Slot) -> None:
        """End a slot, and have none made in its place."""
        if self._lost:
            return
        self._send(wire.Packet(wire.Kind.RETIRE, slot.number))
        if slot.child is not None:
            slot.child.kill()
        self._forget(slot)

    def fetch(self, child: Child, names: tuple[str, ...], most: int) -> int:
        """Have the keeper bring these files when the child has ended; the pipe from which to read them.

        Raises:
            OSError: the keeper is gone.
        """
        read, write = os.pipe()
        try:
            body = json.dumps({"names": names, "most": most}).encode()
            socket.send_fds(child.slot.channel, [wire.pack(wire.Packet(wire.Kind.FETCH, body=body))], [write])
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
        return read

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
        """From launcher and zygote."""
        while not self._lost:
            try:
                data, descriptors = wire.receive(self._control)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose("the sandbox's zygote died")
                return
            packet = wire.unpack(data)
            if packet.kind is wire.Kind.SLOT:
                channel = socket.socket(fileno=descriptors[0])
                slot = self._slots[packet.number] = Slot(packet.number, channel, self._config, self._groups)
                self._loop.add_reader(channel, self._hear_slot, slot)
            elif packet.kind is wire.Kind.READY:
                self.zygote_pid = packet.number
                self._take_ready(json.loads(packet.body))

    def _take_ready(self, said: dict[str, Any]) -> None:
        if self._ready is None or self._ready.done():
            return
        if "error" in said:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in said["error"].items())
            self._ready.set_exception(SandboxBroken(f"the sandbox cannot jail code here: {reasons}"))
        else:
            self._groups = said["memory_groups"]
            self._notifies, self._listener_each = said["notifies"], said["tier"] == RESTRICTED
            self._ready.set_result(said)

    def _hear_slot(self, slot: Slot) -> None:
        """From a keeper and its children."""
        try:
            data, descriptors = wire.receive(slot.channel)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(slot)
            if not slot.has_borne:
                self._count_barren_slot()
            return
        packet = wire.unpack(data)
        if packet.kind == wire.Kind.CHILD:
            slot.has_borne = True
            self._barren_slots = 0
            slot.child = Child(slot, descriptors)
            self._offer(slot)
        elif packet.kind == wire.Kind.EXIT and slot.child is not None:
            child, slot.child = slot.child, None
            self._listener.on_exit(child, packet)
            child.drop()
            if self._listener_each:
                self._close_listener(slot)
        elif packet.kind == wire.Kind.LISTENER:
            slot.listener = descriptors[0]
            self._loop.add_reader(slot.listener, self._hear_end, slot)
            self._offer(slot)

    def _count_barren_slot(self) -> None:
        self._barren_slots += 1
        if self._barren_slots > BARREN_SLOTS * self._workers:
            self.give_up("the sandbox's slots die before they have a child")

    def _offer(self, slot: Slot) -> None:
        """A child may be used when its end can be heard of, where that can be had at all."""
        if slot.child is not None and (slot.listener is not None or not self._notifies):
            self._listener.on_child(slot.child)

    def _hear_end(self, slot: Slot) -> None:
        """A process of the slot stands at the exit that only our own program makes, or one that knows of it: if another
        of the run's processes says so, it speaks for its own run alone."""
        if slot.listener is None:
            return
        try:
            note = seccomp.receive(slot.listener)
        except OSError:
            self._loop.remove_reader(slot.listener)  # nobody is left under the filter
            return
        if note is None:
            return
        status = note.args0 - seccomp.NOTIFY_BASE
        child = slot.child
        if child is None or child.held or not 0 <= status < seccomp.NOTIFY_SPAN:
            seccomp.answer(slot.listener, note.id, go_on=True)
            return
        child.held = note.id
        self._listener.on_ended(child, status & 0xFF)

    def _close_listener(self, slot: Slot) -> None:
        if slot.listener is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(slot.listener)
            os.close(slot.listener)
            slot.listener = None

    def _forget(self, slot: Slot) -> None:
        """Its keeper is gone, or shall go."""
        if self._slots.get(slot.number) is slot:  # its number may be another one's already
            del self._slots[slot.number]
        child, slot.child = slot.child, None
        if child is not None:
            self._listener.on_gone(child, "the sandbox's keeper died")
            child.drop()
        if not self._loop.is_closed():
            self._loop.remove_reader(slot.channel)
        self._close_listener(slot)
        slot.channel.close()

    # -- the end -------------------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        """The zygote is gone: forget it. Its launcher tidies up, which takes milliseconds."""
        if self._lost:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            status = self._process.wait(_LOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(SandboxBroken(f"the sandbox's zygote ended at start with exit code {status}"))
        # Before the children's descriptors close, whoever reads them must stop.
        self._listener.on_lost(reason)
        self._detach()
        if status != 0:
            self._clean()

    def give_up(self, reason: str) -> None:
        """End a zygote that is of no use."""
        self._lose(reason)

    def _detach(self) -> None:
        self._lost = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._control)
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(SandboxBroken("the sandbox was closed while it started"))
        self._control.close()
        for slot in list(self._slots.values()):
            self._forget(slot)

    async def close(self, at_once: bool = False) -> None:
        """End the zygote and all below it; ``at_once`` does not ask it first."""
        if self._lost:
            return
        self._detach()
        if at_once:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        deadline = self._loop.time() + END_S
        try:
            while self._process.poll() is None and self._loop.time() < deadline:
                await asyncio.sleep(_POLL_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            if self._process.wait() != 0:
                self._clean()

    def _clean(self) -> None:
        """After a launcher that could not tidy up. Its processes are dead: the kernel ends them with it."""
        with contextlib.suppress(OSError):
            for hierarchy in cgroups.find():
                cgroups.remove_tree(os.path.join(hierarchy.parent, f"retool-{self._mark[:12]}"))
        folders.wipe(self._root)


def site_packages() -> list[str]:
    """Where this interpreter finds installed packages."""
    names = ("site-packages", "dist-packages")
    return [path for path in sys.path if os.path.basename(path) in names and os.path.isdir(path)]
