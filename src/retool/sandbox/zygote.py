"""The zygote: a small process that imports everything once and forks children that each run one program.

Started by path (``python -B -s -P -S zygote.py FD``) with a clean environment and a control socket as descriptor FD,
so nothing of the trainer is in it, and no site-packages but those that it is told of. Standard library only.

It is single-threaded: it forks, reaps, kills, and tells the supervisor what the kernel told it. When its control socket
closes or it gets SIGTERM, it kills all it ever forked, with their descendants, removes its folder and exits with 0.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __name__ != "__main__":
    from retool.sandbox import folders, jail, program, warmups, wire
else:
    # Hollow packages: the submodules are found, but retool/__init__.py and its heavy imports are not run.
    _here = os.path.dirname(os.path.abspath(__file__))
    for _name, _path in (("retool", os.path.dirname(_here)), ("retool.sandbox", _here)):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [_path]
    from retool.sandbox import folders, jail, program, warmups, wire

    # The program shall find what is installed, not these.
    for _name in [name for name in sys.modules if name.split(".")[0] == "retool"]:
        del sys.modules[_name]

OPEN_FILES = 1024
"""The zygote's own descriptors; also bounds what a child has to close."""
FORK_RETRY_MS = 50
"""After a fork failed (no memory, too many processes)."""
NOT_JAILED = 125
"""Exit code of a child that could not be jailed, as env(1) and timeout(1) use it for their own failure."""
_CODE_FD = 3
_JANITORS = 4
"""Helpers that remove large folders, at a time."""


class Zygote:
    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self.control = control
        self.workers: int = settings["workers"]
        self.root: str = settings["root"]
        self.memory_bytes: int = settings["memory_mb"] << 20
        self.steps: frozenset[str] = frozenset()
        self.pid = os.getpid()
        self.children: dict[int, tuple[int, str]] = {}
        """Number and folder of each child by its pid."""
        self.janitors: set[int] = set()
        self.swept: list[str] = []
        """Folders of ended runs, not looked at yet."""
        self.spare: list[str] = []
        self.dirty: list[str] = []
        """Folders that wait for a janitor."""
        self.count = 0
        self.null = os.open(os.devnull, os.O_RDONLY)
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the control socket closes or SIGTERM comes."""
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noted)
        signal.signal(signal.SIGTERM, _noted)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        wait_ms: int | None = 0
        while True:
            # One fork at a time: an ending must not wait until the pool is full.
            ready = [fd for fd, _ in poll.poll(wait_ms)]
            if self.wake_read in ready:
                if signal.SIGTERM in os.read(self.wake_read, 4096):
                    return
                self._reap()
            if self.control.fileno() in ready and not self._obey():
                return
            wait_ms = None
            if len(self.children) < self.workers:
                try:
                    self._fork()
                    wait_ms = 0
                except (BrokenPipeError, ConnectionResetError):
                    return
                except OSError:
                    wait_ms = FORK_RETRY_MS

    def _obey(self) -> bool:
        data = self.control.recv(wire.MAX_PACKET)
        if not data:
            return False
        packet = wire.unpack(data)
        for pid, (number, _) in self.children.items():
            if number == packet.child:
                _kill_group(pid)
                _kill(pid)  # it may not lead a group yet
                break
        self._tell(wire.Packet(wire.Kind.ACK, packet.child))
        return True

    def _tell(self, packet: wire.Packet) -> None:
        self.control.sendall(wire.pack(packet))

    # -- endings -------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Report every child that ended; kill what the ended runs left behind."""
        ended = False
        while True:
            try:
                # Looked at first, reaped after: while the dead leader is there its number names no other group.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            pid = found.si_pid
            known = self.children.pop(pid, None)
            at = time.monotonic()
            if known is not None:
                _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            ended = True
            if known is not None:
                self._tell(wire.Packet(wire.Kind.EXIT, known[0], status, usage.ru_maxrss, at))
                self.swept.append(known[1])
            self.janitors.discard(pid)
        if ended:
            self._kill_strays()
            self._clean_folders()

    def _kill_strays(self) -> None:
        """Orphans of a run stay below its child while that lives (PR_SET_CHILD_SUBREAPER): what reaches the zygote
        without having been forked by it belongs to a run that is over. Their own orphans come in the next round."""
        for pid in _children_of(self.pid):
            if pid not in self.children and pid not in self.janitors:
                _kill_group(pid)
                _kill(pid)

    def _clean_folders(self) -> None:
        """Keep the empty folders for the next children; have the others removed by helpers, a few at a time."""
        for folder in self.swept:
            (self.spare if folders.is_pristine(folder) else self.dirty).append(folder)
        self.swept = []
        if self.dirty and len(self.janitors) < _JANITORS:
            pid = os.fork()
            if pid == 0:
                self._be_janitor(self.dirty)
            self.janitors.add(pid)
            self.dirty = []

    def _be_janitor(self, dirty: list[str]) -> NoReturn:
        try:
            self._forget_signals()
            os.closerange(0, OPEN_FILES)
            jail.die_with_parent(self.pid, signal.SIGKILL)
            for folder in dirty:
                folders.wipe(folder)
        finally:
            os._exit(0)

    def shut_down(self) -> None:
        """Leave no process and no folder."""
        while True:
            for pid in self.children:
                _kill_group(pid)
                _kill(pid)
            for pid in _children_of(self.pid):
                _kill_group(pid)
                _kill(pid)
            try:
                os.wait3(0)
            except ChildProcessError:
                break
        folders.wipe(self.root)

    # -- children ------------------------------------------------------------------------------------------------------

    def _fork(self) -> None:
        """Fork one child and hand its ends to the supervisor.

        Raises:
            OSError: no more processes, descriptors or disk; or the supervisor is gone.
        """
        self.count += 1
        folder = self._take_folder()
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                self._be_child(folder, (self.null, out_write, err_write, theirs.fileno()))
            self.children[pid] = (self.count, folder)
            head = wire.pack(wire.Packet(wire.Kind.CHILD, self.count, pid))
            try:
                socket.send_fds(self.control, [head], [ours.fileno(), out_read, err_read])
            except OSError:
                _kill(pid)  # the supervisor never heard of it
                raise
        finally:
            ours.close()
            theirs.close()
            for descriptor in (out_read, out_write, err_read, err_write):
                os.close(descriptor)

    def _take_folder(self) -> str:
        if self.spare:
            return self.spare.pop()
        folder = os.path.join(self.root, str(self.count))
        os.mkdir(folder, 0o700)
        return folder

    def _be_child(self, folder: str, descriptors: tuple[int, ...]) -> NoReturn:
        """Jail, wait for the code, run it, exit. ``descriptors``: stdin, stdout, stderr, the code's socket."""
        code = NOT_JAILED
        try:
            self._forget_signals()
            self._take_descriptors(descriptors)
            jail.enter(self._cell(folder), self.steps)
            main = program.prepare()
            head = _receive(wire.CODE_HEAD.size)
            if head is None:
                os._exit(0)
            timeout_s, size = wire.CODE_HEAD.unpack(head)
            jail.limit_cpu(timeout_s)
            source = _receive(size)
            if source is None:
                os._exit(0)
            os.close(_CODE_FD)
            code = 1
            code = program.run(source.decode("utf-8", "surrogatepass"), main)
        finally:
            os._exit(code)

    def _cell(self, folder: str) -> jail.Cell:
        return jail.Cell(folder, self.address_space, self.pid)

    def _forget_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take_descriptors(self, descriptors: tuple[int, ...]) -> None:
        # Above all targets first, so that no dup2 overwrites a source.
        high = [os.dup(fd) if fd > _CODE_FD else _dup_above(fd) for fd in descriptors]
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target, inheritable=target < _CODE_FD)
        os.closerange(_CODE_FD + 1, OPEN_FILES)
        # Python objects that still think to own a number must not close the program's.
        self.control.detach()

    # -- start ---------------------------------------------------------------------------------------------------------

    def warm_up(self, modules: list[str]) -> tuple[list[str], list[str]]:
        """Import ``modules`` and call them once; which were loaded, and which not and why."""
        loaded, skipped = warmups.load(modules)
        program.warm_up()
        gc.collect()
        # What is frozen is never touched by a child's collector, so its pages stay shared.
        gc.freeze()
        return loaded, skipped

    def measure(self) -> None:
        """The address space that children begin with; the limit comes on top."""
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        self.address_space = pages * resource.getpagesize() + self.memory_bytes

    def try_steps(self) -> None:
        """Find out, each in a child of its own, which optional steps work here.

        Raises:
            OSError: what is required does not work; the message names it.
        """
        chosen = {step.name for step in jail.STEPS if step.required}
        if error := self._trial(frozenset(chosen)):
            raise OSError(error)
        for step in jail.STEPS:
            if not step.required and not self._trial(frozenset(chosen | {step.name})):
                chosen.add(step.name)
        self.steps = frozenset(chosen)

    def _trial(self, names: frozenset[str]) -> str:
        """Jail a throw-away child with ``names``; what went wrong, or nothing."""
        folder = os.path.join(self.root, "trial")
        os.mkdir(folder, 0o700)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                jail.enter(self._cell(folder), names)
                # Root without capabilities may not be able to read another user's site-packages.
                for path in sys.path:
                    if os.path.isdir(path):
                        os.listdir(path)
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode()[:1000])
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as report:
            said = report.read().decode()
        _, status = os.waitpid(pid, 0)
        folders.wipe(folder)
        return said or ("" if status == 0 else f"the trial child ended with wait status {status}")


def _noted(signum: int, frame: object) -> None:
    """Signals arrive as bytes on the wake-up pipe."""


def _dup_above(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _CODE_FD + 1)


def _receive(size: int) -> bytes | None:
    """``size`` bytes from the code socket; None where the supervisor closed it first."""
    parts = []
    while size > 0:
        part = os.read(_CODE_FD, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/self/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return _scan_for_children(pid)


def _scan_for_children(parent: int) -> list[int]:
    """For kernels without CONFIG_PROC_CHILDREN."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The name in parentheses may hold anything; the state and the parent's pid follow the last one.
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(name))
    return found


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    settings = json.loads(wire.unpack(control.recv(wire.MAX_PACKET)).body)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jail.die_with_parent(settings["parent"], signal.SIGTERM)
    jail.adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    import site

    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()  # exit() and help(), which -S left out
    sys.path[:] = [path for path in sys.path if path] + settings["paths"]
    sys.argv = [program.FILENAME]
    zygote = Zygote(control, settings)
    try:
        loaded, skipped = zygote.warm_up(settings["preload"])
        zygote.measure()
        zygote.try_steps()
        ready: dict[str, Any] = {
            "loaded": loaded,
            "skipped": skipped,
            "steps": [s.name for s in jail.STEPS if s.name in zygote.steps],
        }
    except Exception as error:
        ready = {"error": f"{type(error).__name__}: {error}"[:1000]}
    try:
        zygote._tell(wire.Packet(wire.Kind.READY, body=json.dumps(ready).encode()))
        if "error" not in ready:
            zygote.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the supervisor is gone
    finally:
        zygote.shut_down()


if __name__ == "__main__":
    main()
