"""The launcher: started by path (``python -B -s -P -S launch.py FD``) with a clean environment and a control socket as
descriptor FD, so nothing of the trainer is in it, and no site-packages but those that it is told of.

It stays outside. It makes the outer namespaces and forks the zygote into them, tries the weaker tier where the stronger
one cannot be had, keeps the control groups, and tidies up when the zygote has ended: it leaves no group, no process and
no folder. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "__main__":
    from retool.sandbox import cgroups, desk, folders, jail, kernel, program, seccomp, tree, wire, zygote
else:
    # Hollow packages: the submodules are found, but retool/__init__.py and its heavy imports are not run.
    _here = os.path.dirname(os.path.abspath(__file__))
    for _name, _path in (("retool", os.path.dirname(_here)), ("retool.sandbox", _here)):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [_path]
    from retool.sandbox import cgroups, desk, folders, jail, kernel, program, seccomp, tree, wire, zygote

    # The program shall find what is installed, not these.
    for _name in [name for name in sys.modules if name.split(".")[0] == "retool"]:
        del sys.modules[_name]

OPEN_FILES = 4096
"""Descriptors of launcher and zygote: some for each slot."""


class Launcher:
    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self.control = control
        self.settings = settings
        self.groups: cgroups.Groups | None = None
        self.without_groups = ""
        self.zygote = 0
        self.first_uid = jail.FIRST_UID + jail.UIDS * (os.getpid() % 4096)
        """Two sandboxes at a time share user numbers only by a rare accident, which namespaces make harmless."""

    def run(self) -> None:
        """The whole life, from the first try to the zygote's end."""
        missing: dict[str, str] = {}
        for tier in (jail.USERNS, jail.RESTRICTED):
            end, handle = self._fork(tier)
            with end:
                said = self._answer_until_told(end, handle)
                if "error" not in said:
                    self._report(said, missing)
                    desk.reply(end)
                    self._answer_until_told(end, handle)
                    return
                desk.reply(end)
            missing[said["layer"] or "zygote"] = said["error"]
            self._wait()
            if not said["layer"]:
                break  # what fails is not the jail
        self._say_ready({"error": missing}, 0)

    # -- the zygote ----------------------------------------------------------------------------------------------------

    def _fork(self, tier: str) -> tuple[socket.socket, int]:
        """Start a zygote; the desk's end, and the pid of whoever makes its namespaces."""
        if tier != jail.RESTRICTED:
            self._make_groups()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            here.close()
            self._be_outer(tier, desk.Desk(there))
        there.close()
        return here, pid

    def _be_outer(self, tier: str, counter: desk.Desk) -> None:
        cell = self._cell(tier)
        cell.map_users = counter.map_users
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            jail.probe(jail.Stage.OUTER, cell)
            inner = 0 if tier == jail.RESTRICTED else os.fork()
            if inner == 0:
                if tier == jail.RESTRICTED:
                    counter.hand_over(os.getpid())
                counter.take_over()
                # Only now: the parent in between has ended, and a change of user would have taken it back.
                kernel.signal_on_parents_death(signal.SIGKILL)
                zygote.be_zygote(self.control, counter, cell, self.settings)
            counter.hand_over(inner)
        except jail.LayerError as error:
            counter.tell(error=str(error), layer=error.layer)
        except BaseException as error:
            counter.tell(error=f"{type(error).__name__}: {error}", layer="")
        finally:
            os._exit(0)

    def _cell(self, tier: str) -> jail.Cell:
        settings = self.settings
        sources = tree.contents(settings["paths"])
        return jail.Cell(
            tier,
            jail.candidates(tier),
            sources=sources,
            folder=jail.home(sources),
            filters={name: seccomp.load(name) for name in ("namespaced", "restricted")},
            file_mb=settings["file_mb"],
            max_files=settings["max_files"],
            first_uid=self.first_uid if tier == jail.RESTRICTED else 0,
        )

    def _make_groups(self) -> None:
        settings = self.settings
        try:
            self.groups = cgroups.Groups(
                settings["mark"], settings["memory_mb"], settings["file_mb"], settings["processes"]
            )
        except OSError as error:
            self.without_groups = str(error)

    # -- the desk ------------------------------------------------------------------------------------------------------

    def _answer_until_told(self, end: socket.socket, pid: int) -> dict[str, Any]:
        """Do what is asked for until the zygote tells how its start went, or ends."""
        while True:
            question = desk.receive(end)
            if question is None:
                return {"layer": "", "error": f"it ended early{self._exit_code()}"}
            kind = question.pop("ask")
            try:
                if kind == "told":
                    return question
                self._serve(end, kind, question, pid)
            except OSError as error:
                desk.reply(end, error=str(error))

    def _exit_code(self) -> str:
        """The zygote's, in words; it has just ended."""
        try:
            _, status = os.waitpid(self.zygote, 0) if self.zygote else (0, -1)
        except ChildProcessError:
            return ""
        return f" with exit code {os.waitstatus_to_exitcode(status)}" if status >= 0 else ""

    def _serve(self, end: socket.socket, kind: str, question: dict[str, Any], pid: int) -> None:
        if kind == "map":
            desk.reply(end, many=self._map_users(pid))
        elif kind == "open":
            joins = self.groups.open_slot(str(question["slot"])) if self.groups else []
            desk.reply(end, joins)
        elif kind == "close":
            if self.groups:
                self.groups.close_slot(str(question["slot"]))
            desk.reply(end)
        elif kind == "child":
            self.zygote = question["pid"]
            if self.zygote != pid:
                os.waitpid(pid, 0)
            desk.reply(end)

    def _map_users(self, pid: int) -> bool:
        """A range of user numbers if this process may give them away; else its own alone."""
        try:
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{pid}/{name}", f"0 {self.first_uid} {jail.UIDS}")
            return True
        except PermissionError:
            _write(f"/proc/{pid}/setgroups", "deny")
            for name, number in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
                _write(f"/proc/{pid}/{name}", f"0 {number} 1")
            return False

    # -- the end -------------------------------------------------------------------------------------------------------

    def _report(self, said: dict[str, Any], missing: dict[str, str]) -> None:
        if (self.groups is None and "cgroup" not in said["missing"]) or self.without_groups:
            said["missing"]["cgroup"] = self.without_groups
        said["missing"] = missing | said["missing"]
        said["memory_groups"] = self.groups.memory_folder() if self.groups and "cgroup" in said["layers"] else ""
        self._say_ready(said, self.zygote)

    def _say_ready(self, said: dict[str, Any], pid: int) -> None:
        packet = wire.Packet(wire.Kind.READY, pid, body=json.dumps(said).encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.sendall(wire.pack(packet))
        # From now on it is the zygote's: the supervisor sees its end when both are gone.
        self.control.close()

    def _wait(self) -> None:
        """Until no descendant is left; what a failed try left behind is killed."""
        while True:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.wait()
            except ChildProcessError:
                return

    def tidy(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._wait()
        if self.groups is not None:
            self.groups.remove()
        folders.wipe(self.settings["root"])


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _children() -> list[int]:
    """Of this process, by the kernel's list where it keeps one, else by looking at all processes."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return _scan_for_children(os.getpid())


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


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, _terminated)
    kernel.signal_on_parents_death(signal.SIGTERM)
    start = control.recv(wire.MAX_PACKET)
    if not start:  # the supervisor died before it could say more than where to start, which is its folder
        folders.wipe(os.getcwd())
        return
    settings = json.loads(wire.unpack(start).body)
    launcher = Launcher(control, settings)
    try:
        # From here on the folder is this process's to remove.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if os.getppid() == settings["parent"]:
            _set_up(settings["paths"])
            launcher.run()
    finally:
        launcher.tidy()


def _set_up(paths: list[str]) -> None:
    """Make this process what a program expects to find, as far as it is the same for all."""
    kernel.set_subreaper(True)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    import site

    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()  # exit() and help(), which -S left out
    sys.path[:] = [path for path in sys.path if path] + paths
    sys.argv = [program.FILENAME]


if __name__ == "__main__":
    main()
