"""The zygote: a small process that imports everything once, and makes slots whose keepers fork children from it.

It runs inside the outer namespaces (the first process of its pid namespace, where the tier has one: when it dies, the
kernel kills all below it). It is single-threaded and runs no user code. It ends when its control socket closes or
SIGTERM comes.

Standard library only, but for the preload list.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from retool.sandbox import compact, jail, keeper, kernel, program, warmups, wire
from retool.sandbox.desk import Desk

RETRY_MS = 50
"""After a slot could not be made (no memory, too many processes)."""
QUICK_DEATH_S = 0.5
"""A keeper that lived no longer is made again only after RETRY_MS, so that a broken slot does not eat a core."""


class Zygote:
    def __init__(self, control: socket.socket, desk: Desk, cell: jail.Cell, settings: dict[str, Any]) -> None:
        self.control = control
        self.desk = desk
        self.cell = cell
        self.settings = settings
        self.wanted: int = settings["workers"]
        self.root: str = settings["root"]
        self.slots: dict[int, tuple[int, float]] = {}
        """Slot and time of birth of each keeper by its pid."""
        self.free: list[int] = []
        """Numbers of slots that were given up."""
        self.next = 0
        self.retired: set[int] = set()
        self.pause_until = 0.0
        self.null = os.open(os.devnull, os.O_RDONLY)
        # Opened while /proc is the machine's own: it may not be there any more when it is needed.
        self.memory_map = os.open("/proc/self/statm", os.O_RDONLY)
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)

    # -- start ---------------------------------------------------------------------------------------------------------

    def prepare(self) -> dict[str, Any]:
        """Go inside, import, probe; what there is to say about it.

        Raises:
            jail.LayerError: the tier that was tried cannot be had.
        """
        jail.probe(jail.Stage.ZYGOTE, self.cell)
        loaded, skipped = warmups.load(self.settings["preload"])
        program.warm_up()
        gc.collect()
        # What is frozen is never touched by a child's collector, so its pages stay shared.
        gc.freeze()
        with contextlib.suppress(OSError):
            compact.compact()
        self.cell.address_space = keeper.address_space(self.memory_map)
        self._try_slot()
        layers = [layer.name for layer in jail.LAYERS if layer.name in self.cell.names]
        return {
            "tier": self.cell.tier,
            "loaded": loaded,
            "skipped": skipped,
            "layers": layers,
            "missing": self.cell.missing,
            "notifies": self.cell.notifies,
        }

    def _try_slot(self) -> None:
        cell = self._slot_cell(0)

        def slot() -> None:
            jail.probe(jail.Stage.SLOT, cell)
            keeper.in_trial(cell, lambda: keeper.try_out(cell))

        try:
            keeper.in_trial(cell, slot)
        finally:
            for descriptor in cell.joins:
                os.close(descriptor)
            self.desk.close_slot(0)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the control socket closes or SIGTERM comes."""
        self._take_number(keeper.CODE_FD)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noted)
        signal.signal(signal.SIGTERM, _noted)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(self._patience_ms())]
            if self.wake_read in ready:
                if signal.SIGTERM in os.read(self.wake_read, 4096):
                    return
                self._reap()
            if self.control.fileno() in ready and not self._obey():
                return
            if len(self.slots) < self.wanted and time.monotonic() >= self.pause_until:
                try:
                    self._make_slot()
                except (BrokenPipeError, ConnectionResetError):
                    return
                except OSError:
                    self.pause_until = time.monotonic() + RETRY_MS / 1e3

    def _take_number(self, number: int) -> None:
        """Nothing that a keeper holds may have the number that its children get their code under."""
        try:
            os.fstat(number)
        except OSError:
            os.dup2(self.null, number)

    def _patience_ms(self) -> int | None:
        if len(self.slots) >= self.wanted:
            return None
        return max(0, int(1e3 * (self.pause_until - time.monotonic())) + 1) if self.pause_until else 0

    def _obey(self) -> bool:
        data = self.control.recv(wire.MAX_PACKET)
        if not data:
            return False
        packet = wire.unpack(data)
        if packet.kind is wire.Kind.GROW:
            self.wanted += 1
        elif packet.kind is wire.Kind.RETIRE and packet.number not in self.retired:
            self.wanted -= 1
            if any(slot == packet.number for slot, _ in self.slots.values()):
                self.retired.add(packet.number)
        return True

    def _reap(self) -> None:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            slot, born = self.slots.pop(pid, (-1, 0.0))
            if slot < 0:
                continue
            self.desk.close_slot(slot)
            heapq.heappush(self.free, slot)
            if slot in self.retired:
                self.retired.discard(slot)
            elif time.monotonic() - born < QUICK_DEATH_S:
                self.pause_until = time.monotonic() + RETRY_MS / 1e3

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _slot_cell(self, slot: int) -> jail.Cell:
        """The cell, made out to that slot."""
        cell = self.cell
        cell.slot, cell.joins = slot, self.desk.open_slot(slot) if "cgroup" in cell.names else []
        if cell.tier == jail.RESTRICTED:
            cell.folder = os.path.join(self.root, str(slot))
            os.makedirs(cell.folder, 0o700, exist_ok=True)
        return cell

    def _make_slot(self) -> None:
        """Make a keeper and hand its channel to the supervisor.

        Raises:
            OSError: no more processes, descriptors or control groups; or the supervisor is gone.
        """
        slot = self.free[0] if self.free else self.next
        cell = self._slot_cell(slot)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = self._fork_keeper(cell, theirs, ours)
            self.slots[pid] = (slot, time.monotonic())
            if self.free:
                heapq.heappop(self.free)
            self.next = max(self.next, slot + 1)
            socket.send_fds(self.control, [wire.pack(wire.Packet(wire.Kind.SLOT, slot))], [ours.fileno()])
        finally:
            ours.close()
            theirs.close()
            for descriptor in cell.joins:
                os.close(descriptor)

    def _fork_keeper(self, cell: jail.Cell, channel: socket.socket, other_end: socket.socket) -> int:
        """The keeper's pid. In a tier with namespaces its parent is in between: a process that enters a new pid
        namespace is not in it, its next child is."""
        if cell.tier == jail.RESTRICTED:
            pid = os.fork()
            if pid == 0:
                other_end.close()  # a keeper that held it would never see that the supervisor has gone
                self._be_keeper(cell, channel, signal.SIGKILL)
            return pid
        read, write = os.pipe()
        parent = os.fork()
        if parent == 0:
            try:
                os.close(read)
                jail.apply(jail.Stage.SLOT, cell)
                pid = os.fork()
                if pid == 0:
                    os.close(write)
                    other_end.close()
                    self._be_keeper(cell, channel, None)
                os.write(write, b"%d" % pid)
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read()
        _reap(parent)
        if not said:
            raise OSError("a slot's namespaces could not be made")
        return int(said)

    def _be_keeper(self, cell: jail.Cell, channel: socket.socket, on_parents_death: int | None) -> NoReturn:
        try:
            self._forget_signals()
            self.control.close()
            self.desk.close()
            if on_parents_death is not None:
                kernel.signal_on_parents_death(on_parents_death)
            keeper.Keeper(cell, channel, self.null).serve()
        finally:
            os._exit(1)

    def _forget_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # No handler at all: the kernel keeps signals without one from the first process of a pid namespace.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _noted(signum: int, frame: object) -> None:
    """Signals arrive as bytes on the wake-up pipe."""


def be_zygote(control: socket.socket, desk: Desk, cell: jail.Cell, settings: dict[str, Any]) -> NoReturn:
    """The zygote's whole life, from the launcher's fork on."""
    code = 1
    try:
        zygote = Zygote(control, desk, cell, settings)
        if cell.tier == jail.RESTRICTED:
            kernel.set_subreaper(True)  # no first process of a pid namespace: a dead keeper's child comes here
        try:
            ready = zygote.prepare()
        except jail.LayerError as error:
            desk.tell(error=str(error), layer=error.layer)
            os._exit(1)
        except Exception as error:
            desk.tell(error=f"{type(error).__name__}: {error}"[:1000], layer="")
            os._exit(1)
        desk.tell(**ready)
        zygote.serve()
        code = 0
    except (BrokenPipeError, ConnectionResetError):
        code = 0  # the supervisor or the launcher is gone
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)
