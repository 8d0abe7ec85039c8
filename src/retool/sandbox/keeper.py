"""A slot's keeper: the first process of its own namespaces, which has one jailed child at a time.

It forks a child, waits for its end, tells the supervisor what the kernel said of it, kills and reaps whatever else is
in the slot, brings files that were asked for, makes the slot as new, and forks the next child. It runs no user code,
and the kernel lets nobody inside the slot signal it.

Standard library only, as all that the zygote imports.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import sys
import termios
import time
from collections.abc import Callable
from typing import Any, NoReturn

from retool.sandbox import compact, folders, jail, kernel, program, seccomp, wire

CODE_FD = 3
"""Where a child reads its code, and the last descriptor that it keeps."""
_CLOSE_FROM, _CLOSE_TO = CODE_FD + 1, 1024
_CHILD, _EXIT, _LISTENER = int(wire.Kind.CHILD), int(wire.Kind.EXIT), int(wire.Kind.LISTENER)
_NO_BYTES = bytes(4)
_SETTLE_ROUNDS = 20
_SETTLE_S = 0.005


class SlotSpoiledError(Exception):
    """The slot cannot be made as new; it has to be built afresh."""


class Keeper:
    """What can be done before a fork is done here, by the keeper: a page that a child writes to is copied for it, a
    page that the keeper writes to is its own again as soon as the last child is dead."""

    def __init__(self, cell: jail.Cell, channel: socket.socket, null: int) -> None:
        self.cell = cell
        self.channel = channel
        self.channel_number = channel.fileno()
        self.null = null
        self.cell.parent = os.getpid()
        self.homes = [cell.folder] if cell.tier == jail.RESTRICTED else [cell.folder, "/dev/shm"]
        self.mode = 0o700 if cell.tier == jail.RESTRICTED else 0o1777

    def serve(self) -> NoReturn:
        """Until the supervisor closes the channel; what is in the slot then dies with this process."""
        try:
            jail.apply(jail.Stage.KEEPER, self.cell)
            if self.cell.listener is not None:
                self._send_listener()
            self.child_steps = jail.steps(jail.Stage.CHILD, self.cell)
            self.fresh = self._free_space()
            os.umask(0o077)
            os.chdir(self.cell.folder)
            self.main = program.Main(self.cell.folder)
            self._have_a_child()
            with contextlib.suppress(OSError):
                compact.drop_clean_pages()  # now that this process has what it needs itself
            kernel.set_dumpable(False)
            while True:
                self._have_a_child()
        except (BrokenPipeError, ConnectionResetError, SlotSpoiledError):
            os._exit(0)
        except BaseException:
            os._exit(1)

    def _have_a_child(self) -> None:
        self._await(self._fork())
        self._fetch()
        self._clean()

    def _send_listener(self) -> None:
        if self.cell.listener is not None:
            wire.send(self.channel, wire.head(_LISTENER), (self.cell.listener,))
            os.close(self.cell.listener)
            self.cell.listener = None

    # -- the child's life ----------------------------------------------------------------------------------------------

    def _fork(self) -> int:
        """Fork a child, and hand its ends to the supervisor."""
        program.reseed()
        code_read, code_write = os.pipe()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        pid = kernel.fork()
        if pid == 0:
            self._be_child((self.null, out_write, err_write, code_read))
        handle = os.pidfd_open(pid)
        wire.send(self.channel, wire.head(_CHILD), (handle, code_write, out_read, err_read))
        for descriptor in (code_read, code_write, out_read, out_write, err_read, err_write, handle):
            os.close(descriptor)
        return pid

    def _await(self, pid: int) -> None:
        """Reap orphans until the child ends; report it; empty the slot."""
        while True:
            ended, status, usage = os.wait4(-1, 0)
            if ended == pid:
                break
        self.channel.send(wire.head(_EXIT, status, usage.ru_maxrss, time.monotonic()))
        # In tier ``restricted`` a run is one process, and this one shares its namespace with the whole machine.
        if self.cell.tier != jail.RESTRICTED:
            self._empty()

    def _empty(self) -> None:
        """Kill and reap whatever else is in the slot. Orphans are this process's own children at once, so that there
        is nobody where it has none."""
        try:
            os.waitpid(-1, os.WNOHANG)
            while True:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # all of this pid namespace but its first process
                os.waitpid(-1, 0)
        except ChildProcessError:
            return

    # -- between two children ------------------------------------------------------------------------------------------

    def _free_space(self) -> tuple[int, int]:
        if self.cell.tier == jail.RESTRICTED:
            return 0, 0
        found = os.statvfs(self.cell.folder)
        return found.f_bfree, found.f_ffree

    def _clean(self) -> None:
        """Make the working folder as new.

        Raises:
            SlotSpoiledError: something stays behind."""
        if self._is_as_new():
            return
        for _ in range(_SETTLE_ROUNDS):
            for home in self.homes:
                folders.empty(home)
                os.chmod(home, self.mode)
            if self._is_as_new():
                return
            time.sleep(_SETTLE_S)  # the kernel frees the files of dead sockets a little later
        raise SlotSpoiledError

    def _is_as_new(self) -> bool:
        # By the file system's own count, so that nothing hides from it.
        if self._free_space() != self.fresh:
            return False
        if self.cell.many_uids and "uid" in self.cell.names:
            return True  # the folders themselves belong to this process's user, so no run could change them
        return all(folders.is_pristine(home, self.mode) for home in self.homes)

    def _fetch(self) -> None:
        """Answer a FETCH that came before the end."""
        while fcntl.ioctl(self.channel_number, termios.FIONREAD, _NO_BYTES) != _NO_BYTES:
            data, descriptors = wire.receive(self.channel, wire.DO_NOT_WAIT)
            if not data:
                os._exit(0)
            wanted = json.loads(wire.unpack(data).body)
            with open(descriptors[0], "wb") as pipe, contextlib.suppress(BrokenPipeError):
                room = wanted["most"]
                for name in wanted["names"]:
                    room -= self._bring(name, room, pipe)

    def _bring(self, name: str, room: int, pipe: object) -> int:
        write = pipe.write  # type: ignore[attr-defined]
        try:
            data = _read_file(self.cell.folder, name, room)
        except OSError as error:
            write(wire.pack_file(False, (error.strerror or str(error)).encode()))
            return 0
        write(wire.pack_file(True, data))
        return len(data)

    # -- inside the child ----------------------------------------------------------------------------------------------

    def _be_child(self, descriptors: tuple[int, ...]) -> NoReturn:
        """Get jailed, wait for the code, run it, exit. ``descriptors``: stdin, stdout, stderr, the code's stream."""
        code = wire.NOT_JAILED
        try:
            for target, descriptor in enumerate(descriptors):
                # The keeper's own descriptors are above these targets, but for the last, which may be there already.
                if descriptor != target:
                    os.dup2(descriptor, target, target < CODE_FD)
            for step in self.child_steps:
                step(self.cell)
            self._send_listener()
            os.closerange(_CLOSE_FROM, _CLOSE_TO)
            self.main.wake_up()
            order = wire.receive_order(CODE_FD)
            os.close(CODE_FD)
            if order is None:
                os._exit(0)
            code = 1
            code = self._obey(order, self.main) & 0xFF
            if self.main.is_itself():
                # The supervisor hears of it before the kernel has torn the process down.
                code |= seccomp.NOTIFY_BASE
        finally:
            os._exit(code)

    def _obey(self, order: wire.Order, main: program.Main) -> int:
        """Run the order, and those that follow it where the interpreter stays; the exit code."""
        again = False
        while True:
            if code := self._begin(order, again):
                return code
            again = True
            source = order.code.decode("utf-8", "surrogatepass")
            if not order.stays:
                return main.run(source)
            code = main.run_cell(source)
            if not main.is_itself():
                return code
            # The supervisor holds this call until there is more to do, and answers it with a descriptor.
            stream = kernel.raw_exit_group(seccomp.NOTIFY_BASE | wire.CELL_ENDED | code)
            if stream < 0:
                return code
            following = wire.receive_order(stream)
            os.close(stream)
            if following is None:
                return code
            order = following

    def _begin(self, order: wire.Order, again: bool) -> int:
        self.cell.stays = order.stays
        jail.limit_run(self.cell, order.cpu_s, order.memory_bytes, order.file_bytes, order.processes, again=again)
        if not order.files and not order.stdin:
            return 0
        return program.guard(lambda: program.lay_out(order.files, order.stdin))


def _read_file(folder: str, name: str, room: int) -> bytes:
    """Raises: OSError, whose text says why the file cannot be brought."""
    base = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            handle = kernel.open_beneath(base, name)
        except OSError as error:
            # ELOOP and EXDEV: RESOLVE_NO_SYMLINKS and RESOLVE_BENEATH had to act
            raise OSError(error.errno, "a symbolic link" if error.errno == 40 else error.strerror) from None
    finally:
        os.close(base)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "not a regular file")
        if found.st_size > room:
            raise OSError(0, f"{found.st_size} bytes are more than may be brought back")
        with open(handle, "rb", closefd=False) as file:  # which refuses a folder, and leaves its descriptor open
            return file.read(room)
    finally:
        os.close(handle)


def try_out(cell: jail.Cell) -> None:
    """Be the trial slot's keeper: probe the layers of KEEPER and, in a child, of CHILD.

    Raises:
        jail.LayerError: one that the tier cannot do without.
    """
    jail.probe(jail.Stage.KEEPER, cell)
    cell.parent = os.getpid()

    def child() -> None:
        os.chdir(cell.folder)
        jail.probe(jail.Stage.CHILD, cell)
        _check_packages(cell)

    in_trial(cell, child)


def in_trial(cell: jail.Cell, work: Callable[[], None]) -> None:
    """Do ``work`` in a child process, and take over what it found out about the cell's layers.

    Raises:
        jail.LayerError: what went wrong there; without a layer's name where it was not a layer.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said: dict[str, object] = {"layer": "", "error": "it ended early"}
        try:
            work()
            said = {"names": sorted(cell.names), "missing": cell.missing, "notifies": cell.notifies}
        except jail.LayerError as error:
            said = {"layer": error.layer, "error": str(error)}
        except BaseException as error:
            said = {"layer": "", "error": f"{type(error).__name__}: {error}"}
        finally:
            os.write(write, json.dumps(said).encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    told: dict[str, Any] = (
        json.loads(text) if text else {"layer": "", "error": f"the trial ended with wait status {status}"}
    )
    if "error" in told:
        raise jail.LayerError(told["layer"], OSError(told["error"]))
    cell.names = set(told["names"])
    cell.missing = told["missing"]
    cell.notifies = told["notifies"]


def _check_packages(cell: jail.Cell) -> None:
    """Another user, without capabilities, must be able to read what programs import."""
    try:
        for path in sys.path:
            if os.path.isdir(path):
                os.listdir(path)
    except OSError as error:
        if "uid" not in cell.names:
            raise
        cell.names.discard("uid")
        cell.missing["uid"] = str(error)


def address_space(memory_map: int) -> int:
    """Bytes mapped by this process, from its open /proc/self/statm."""
    return int(os.pread(memory_map, 256, 0).split()[0]) * resource.getpagesize()
