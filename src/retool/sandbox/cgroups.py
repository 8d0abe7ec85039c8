"""Control groups: what the kernel counts and bounds for all of a run's processes together. Versions 1 and 2.

Each slot has a group of its own below one group of the sandbox, which lies below the group that the sandbox was started
in where the kernel allows it, so that limits which hold outside hold inside too.

Standard library only: the zygote's launcher imports it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass

NEEDED = ("memory", "pids")
OPTIONAL = ("cpu",)
CPU_WEIGHT = 25
"""A quarter of the default: when a core is short, the trainer comes first."""
_ROOM_MB = 32
"""On top of a run's memory and files: page tables, buffers of pipes and the keeper's own pages."""
_REMOVE_S = 2.0
"""Patience with groups whose last process is just ending."""


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy and where in it the sandbox's group goes."""

    version: int
    controllers: tuple[str, ...]
    parent: str
    """A folder."""


def find(proc: str = "/proc/self") -> list[Hierarchy]:
    """The hierarchies that hold the controllers, with the group of the process in each.

    Raises:
        OSError: a needed controller is mounted nowhere.
    """
    own = _own_groups(proc)
    found: list[Hierarchy] = []
    for kind, mount, root, options in _mounts(proc):
        if kind == "cgroup2":
            there = _words(os.path.join(mount, "cgroup.controllers"))
            version, group = 2, own.get("", "/")
        else:
            there = options.split(",")
            version, group = 1, next((own[name] for name in there if name in own), "/")
        held = tuple(name for name in NEEDED + OPTIONAL if name in there)
        if held:
            inner = os.path.relpath(group, root) if group.startswith(root) else "."
            found.append(Hierarchy(version, held, os.path.normpath(os.path.join(mount, inner))))
    for name in NEEDED:
        if not any(name in hierarchy.controllers for hierarchy in found):
            raise OSError(f"no cgroup hierarchy with the controller {name!r} is mounted")
    return found


def _own_groups(proc: str) -> dict[str, str]:
    """Path of the process's group by controller; version 2 under the empty name."""
    with open(f"{proc}/cgroup") as file:
        rows = [line.rstrip("\n").split(":", 2) for line in file]
    return {name: path for _, names, path in rows for name in names.split(",")}


def _mounts(proc: str) -> list[tuple[str, str, str, str]]:
    """Type, mount point, root inside the hierarchy and super options of each cgroup mount."""
    found = []
    with open(f"{proc}/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, _, options = right.rstrip("\n").split(" ", 2)
            if kind in ("cgroup", "cgroup2"):
                root, point = left.split(" ")[3:5]
                found.append((kind, point, root, options))
    return found


def _words(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class Groups:
    """The sandbox's groups.

    Raises:
        OSError: no group can be made here; the message says where.
    """

    def __init__(self, mark: str, memory_mb: int, file_mb: int, processes: int) -> None:
        self.memory_mb, self.file_mb, self.processes = memory_mb, file_mb, processes
        self.folders: list[tuple[Hierarchy, str]] = []
        try:
            for hierarchy in find():
                try:
                    self.folders.append((hierarchy, _make_parent(hierarchy, f"retool-{mark}")))
                except OSError:
                    if any(name in NEEDED for name in hierarchy.controllers):
                        raise
            self.close_slot("trial", self.open_slot("trial"))
        except BaseException:
            self.remove()
            raise

    def open_slot(self, name: str) -> list[int]:
        """Make a slot's groups; descriptors to which a process writes ``0`` to join them, the one that counts memory
        first."""
        joins: list[int] = []
        for hierarchy, folder in self.folders:
            group = os.path.join(folder, name)
            os.makedirs(group, exist_ok=True)
            if "memory" in hierarchy.controllers:
                set_memory(group, memory_bytes(self.memory_mb, self.file_mb))
            if "pids" in hierarchy.controllers:
                # The keeper may be in it too; one more tells a full group from a broken one.
                _write(os.path.join(group, "pids.max"), str(self.processes + 2))
            join = os.open(os.path.join(group, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
            joins.insert(0 if "memory" in hierarchy.controllers else len(joins), join)
        return joins

    def close_slot(self, name: str, joins: list[int] | None = None) -> None:
        for descriptor in joins or []:
            os.close(descriptor)
        for _, folder in self.folders:
            _remove_group(os.path.join(folder, name))

    def memory_folder(self) -> str:
        """Where the slots' groups with the memory controller are."""
        return next(folder for hierarchy, folder in self.folders if "memory" in hierarchy.controllers)

    def remove(self) -> None:
        """Kill what is still in the groups, and remove them."""
        for _, folder in self.folders:
            remove_tree(folder)


def memory_bytes(memory_mb: int, file_mb: int) -> int:
    return (memory_mb + file_mb + _ROOM_MB) << 20


def _make_parent(hierarchy: Hierarchy, name: str) -> str:
    """The sandbox's own group: below the process's group, or as near above it as the kernel allows. Version 2 gives
    no controllers to the children of a group that holds processes itself."""
    place = hierarchy.parent
    while True:
        folder = os.path.join(place, name)
        try:
            if hierarchy.version == 2:
                _enable(place, hierarchy.controllers)
            os.mkdir(folder)
            try:
                if hierarchy.version == 2:
                    _enable(folder, hierarchy.controllers)
                _set_weight(folder, hierarchy)
                return folder
            except OSError:
                os.rmdir(folder)
                raise
        except OSError:
            above = os.path.dirname(place)
            if hierarchy.version == 1 or not os.path.exists(os.path.join(above, "cgroup.procs")):
                raise
            place = above


def _enable(folder: str, controllers: tuple[str, ...]) -> None:
    control = os.path.join(folder, "cgroup.subtree_control")
    there = _words(control)
    for name in controllers:
        if name not in there:
            _write(control, f"+{name}")


def _set_weight(folder: str, hierarchy: Hierarchy) -> None:
    if "cpu" in hierarchy.controllers:
        if hierarchy.version == 2:
            _write(os.path.join(folder, "cpu.weight"), str(CPU_WEIGHT))
        else:
            _write(os.path.join(folder, "cpu.shares"), str(1024 * CPU_WEIGHT // 100))


def set_memory(group: str, limit: int) -> None:
    """Bound the group's memory; swap does not extend it, where the kernel counts swap.

    Raises:
        OSError: the kernel does not take it.
    """
    if os.path.exists(os.path.join(group, "memory.max")):
        _write(os.path.join(group, "memory.max"), str(limit))
        with contextlib.suppress(OSError):
            _write(os.path.join(group, "memory.swap.max"), "0")
        return
    # Version 1 wants limit ≤ memory-and-swap limit at every moment: so one of the two orders works.
    both = os.path.join(group, "memory.memsw.limit_in_bytes")
    try:
        _write(os.path.join(group, "memory.limit_in_bytes"), str(limit))
        if os.path.exists(both):
            _write(both, str(limit))
    except OSError:
        if not os.path.exists(both):
            raise
        _write(both, str(limit))
        _write(os.path.join(group, "memory.limit_in_bytes"), str(limit))


def oom_kills(group: str) -> int:
    """How many processes of the group the kernel has killed for want of memory; 0 where it does not say."""
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError), open(os.path.join(group, name)) as file:
            for line in file:
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0


def remove_tree(folder: str) -> None:
    """Remove a group and those below it, with the processes in them."""
    try:
        inner = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return
    for path in inner:
        _remove_group(path)
    _remove_group(folder)


def _remove_group(folder: str) -> None:
    deadline = time.monotonic() + _REMOVE_S
    while os.path.isdir(folder):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            for word in _words(os.path.join(folder, "cgroup.procs")):
                with contextlib.suppress(OSError):
                    os.kill(int(word), signal.SIGKILL)
            time.sleep(0.005)
