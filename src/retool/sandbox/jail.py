"""What contains one run of code: one ordered list of layers, ``LAYERS``, each one concern.

A layer has a step for each stage in which it has something to do; within a stage the steps are applied in the list's
order. The stages follow the processes from the outside in:

    OUTER    the zygote's parent, before it forks the zygote
    ZYGOTE   the zygote, before it imports anything that is not Python's own
    SLOT     a slot's parent, before it forks the slot's keeper
    KEEPER   the keeper, first process of its slot, before its first run
    CHILD    the process that is about to get code

At start a trial slot probes every layer. Which of them work decides the tier:

    full        namespaces, a user of its own for each slot, control groups
    userns      namespaces only: what an unprivileged user can have
    restricted  no namespaces: seccomp, Landlock, no_new_privs, rlimits; one process a run, threads only. What is left
                where namespaces are forbidden, as in Docker's default profile

Not covered, in any tier:

- Bugs of the kernel. The system calls that are left (an allow-list) are the attack surface; put gVisor (runsc) or a
  microVM (Firecracker, Kata) around the whole program where runs must not share a kernel with anything of worth.
- Shared address-space layout: all runs are forks of one zygote, so an address leaked by one is true for the next.
- Side channels: timing, caches, speculative execution, what can be learnt from how busy the machine is.
- Tier ``userns``: memory is bounded for each process and processes in number, their product is not. All runs have the
  same user, kept apart by namespaces alone.
- Tier ``restricted``: the disk is bounded for each file, not for the sum, and files lie on the machine's disk. Names,
  sizes and owners of files outside can be asked for (stat), their contents cannot.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from retool.sandbox import kernel, seccomp, tree

FULL, USERNS, RESTRICTED = "full", "userns", "restricted"
TIERS = (RESTRICTED, USERNS, FULL)
"""From the weakest to the strongest."""

OPEN_FILES = 256
"""Open descriptors: enough for a pool of processes, and small next to the usual limit of 1024."""
PENDING_SIGNALS = 1024
"""Queued signals and POSIX timers."""
MEMORY_RESERVE_BYTES = 64 << 20
"""Address space kept back for printing the traceback of a MemoryError."""
MAX_CPU_S = 2**31
"""What fits into every kernel's RLIMIT_CPU."""
FIRST_UID = 0x70000000
"""First of the user numbers that slots take: above what systemd gives to containers (below 0x70000000), below 2**31,
where some programs stop."""
UIDS = 1 << 16
"""User numbers of one sandbox: its zygote's root, then one for each slot."""
FIRST_SLOT_UID = 1000
HOMES = ("/tmp", "/sandbox")
"""A run's working folder where it has a file system of its own: the first that hides nothing which the code needs."""
HOST_NAME = "sandbox"
_PROC_FLAGS = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


class Stage(Enum):
    OUTER = auto()
    ZYGOTE = auto()
    SLOT = auto()
    KEEPER = auto()
    CHILD = auto()


@dataclass
class Cell:
    """What the steps need to know, filled in on the way inwards."""

    tier: str
    """What is tried: USERNS (which may turn out to be FULL), or RESTRICTED."""
    names: set[str]
    """Of the layers that are applied."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layers that were tried and failed, each with the reason."""
    sources: list[str] = field(default_factory=list)
    """Paths of the machine that the code may read."""
    plan: tree.Plan | None = None
    filters: dict[str, bytes] = field(default_factory=dict)
    """seccomp programs by name, read before the tree hides their files."""
    file_mb: int = 64
    max_files: int = 1024
    map_users: Callable[[], bool] = lambda: False
    """Have the launcher map user numbers into a new namespace; whether it could map a range, and not just one."""
    many_uids: bool = False
    first_uid: int = 0
    """What FIRST_SLOT_UID counts from."""
    slot: int = 0
    joins: list[int] = field(default_factory=list)
    """Descriptors to which a process writes ``0`` to join the slot's control groups, that for memory first."""
    folder: str = HOMES[0]
    """The run's working folder."""
    counts_processes: bool = False
    """Whether RLIMIT_NPROC would count this slot's processes alone."""
    notifies: bool = True
    """Whether a listener could be had."""
    listener: int | None = None
    """Where the supervisor hears of a program's end; see ``retool.sandbox.seccomp``."""
    address_space: int = 0
    """Bytes that the zygote has mapped: the memory limit comes on top."""
    stays: bool = False
    """Whether the child's interpreter is a session's."""
    parent: int = 0
    """The keeper's pid as its child sees it."""


Step = Callable[[Cell], None]


@dataclass(frozen=True)
class Layer:
    name: str
    tiers: frozenset[str]
    """Those that cannot be had without it."""
    mend: str
    """How to get it."""
    steps: dict[Stage, Step]


class LayerError(OSError):
    """A layer could not be applied; ``layer`` is its name."""

    def __init__(self, layer: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.layer = layer


def apply(stage: Stage, cell: Cell) -> None:
    """Apply the steps of one stage, in order.

    Raises:
        LayerError: a step failed; no code may run then.
    """
    for layer in LAYERS:
        if layer.name in cell.names and stage in layer.steps:
            try:
                layer.steps[stage](cell)
            except Exception as error:
                raise LayerError(layer.name, error) from error


def steps(stage: Stage, cell: Cell) -> list[Step]:
    """What ``apply`` would do, for who has to be quick about it."""
    return [layer.steps[stage] for layer in LAYERS if layer.name in cell.names and stage in layer.steps]


def probe(stage: Stage, cell: Cell) -> None:
    """The same for the first time: a layer that fails and that the cell's tier can do without moves from its ``names``
    to its ``missing``, with the reason.

    Raises:
        LayerError: one that the tier cannot do without.
    """
    for layer in LAYERS:
        if layer.name in cell.names and stage in layer.steps:
            try:
                layer.steps[stage](cell)
            except Exception as error:
                if cell.tier in layer.tiers:
                    raise LayerError(layer.name, error) from error
                cell.names.discard(layer.name)
                cell.missing[layer.name] = f"{type(error).__name__}: {error}"


# -- the steps ---------------------------------------------------------------------------------------------------------


def _yield_when_memory_is_short(cell: Cell) -> None:
    # When the machine itself runs out of memory the kernel shall take a run, not the trainer.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _join_groups(cell: Cell) -> None:
    if not cell.joins:
        raise OSError("no control group can be made")
    for descriptor in cell.joins[1:]:
        os.write(descriptor, b"0")
        os.close(descriptor)


def _join_memory_group(cell: Cell) -> None:
    # Not the keeper: when a run's processes use up its memory in small pieces, the kernel could take the keeper for the
    # largest of them, and a fault of the machine is what a bad program would like to look like.
    os.write(cell.joins[0], b"0")


def _user_namespace(cell: Cell) -> None:
    kernel.unshare(kernel.CLONE_NEWUSER)
    cell.many_uids = cell.map_users()


def _nested_user_namespace(cell: Cell) -> None:
    """Where all slots have one user: a namespace each, so that the kernel counts each slot's processes apart."""
    if cell.many_uids:
        return
    try:
        kernel.unshare(kernel.CLONE_NEWUSER)
    except OSError:  # nesting may be bounded
        return
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    cell.counts_processes = True


def _pid_namespace(cell: Cell) -> None:
    kernel.unshare(kernel.CLONE_NEWPID)


def _net_namespace(cell: Cell) -> None:
    # A new one has no device but a loopback that is down.
    kernel.unshare(kernel.CLONE_NEWNET)


def _ipc_namespace(cell: Cell) -> None:
    kernel.unshare(kernel.CLONE_NEWIPC)


def _uts_namespace(cell: Cell) -> None:
    kernel.unshare(kernel.CLONE_NEWUTS)
    kernel.sethostname(HOST_NAME)


def _mount_namespace(cell: Cell) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)


def _look_up_the_tree(cell: Cell) -> None:
    """Inside its mount namespace, and still as the user outside, who alone may be able to walk to the packages."""
    cell.plan = tree.open_sources(cell.sources)
    # Root inside is nobody outside (where a range was mapped), or the user itself.
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    if cell.many_uids:
        os.setgroups([])
    kernel.set_dumpable(True)  # else its /proc entries belong to the real root, and it cannot map users itself


def _build_the_tree(cell: Cell) -> None:
    if cell.plan is not None:
        tree.build(cell.plan)


def _visible_proc(cell: Cell) -> None:
    # A slot may mount its own only where one is to be seen whole already.
    kernel.mount("proc", "proc", "proc", _PROC_FLAGS & ~kernel.MS_RDONLY)


def _read_only_root(cell: Cell) -> None:
    tree.enter()


def _own_proc(cell: Cell) -> None:
    # Only its own namespace's processes are in it; read-only, so that no run can tune the next one's keeper.
    kernel.mount("proc", "/proc", "proc", _PROC_FLAGS)


def _disk(cell: Cell) -> None:
    """One file system in memory, bounded, for all that a run may write."""
    options = f"size={cell.file_mb}m,nr_inodes={cell.max_files + 4},mode=711"
    kernel.mount("tmpfs", "/box", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for name, target in (("tmp", cell.folder), ("shm", "/dev/shm")):
        os.mkdir(f"/box/{name}")
        os.chmod(f"/box/{name}", 0o1777)
        kernel.mount(f"/box/{name}", target, None, kernel.MS_BIND)
    kernel.unmount("/box")


def _session(cell: Cell) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _fixed_limits(cell: Cell) -> None:
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_MEMLOCK, 1 << 16),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, PENDING_SIGNALS),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _own_user(cell: Cell) -> None:
    uid = cell.first_uid + FIRST_SLOT_UID + cell.slot
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _probe_own_user(cell: Cell) -> None:
    if cell.tier != RESTRICTED and not cell.many_uids:
        raise OSError("only one user number could be mapped")


def _give_folder_away(cell: Cell) -> None:
    _probe_own_user(cell)
    uid = cell.first_uid + FIRST_SLOT_UID + cell.slot
    if cell.tier == RESTRICTED:
        os.chown(cell.folder, uid, uid)
    cell.counts_processes = True


def _no_new_privs(cell: Cell) -> None:
    kernel.set_no_new_privs()


def _no_more_capabilities(cell: Cell) -> None:
    kernel.limit_capabilities()


def _no_capabilities(cell: Cell) -> None:
    # A change from root to another user has emptied them; nothing is done twice here, since each run pays for it.
    if cell.tier == RESTRICTED or "uid" not in cell.names:
        kernel.empty_capabilities()


def _landlock(cell: Cell) -> None:
    devices = [f"/dev/{name}" for name in tree.DEVICES]
    if cell.tier == RESTRICTED:
        kernel.landlock(tree.resolved(cell.sources) + devices, [cell.folder, "/dev/null"])
    else:
        kernel.landlock(["/"], [cell.folder, "/dev/shm", *devices])


def _seccomp_for_the_slot(cell: Cell) -> None:
    if cell.tier != RESTRICTED:
        # Once for the slot: all its children inherit it for nothing, and share the listener.
        _install(cell, cell.filters["namespaced"])


def _seccomp_for_one_process(cell: Cell) -> None:
    if cell.tier == RESTRICTED:
        # It forbids new processes, so the keeper cannot have it; and it lets a process signal itself alone.
        _install(cell, seccomp.for_process(cell.filters["restricted"], os.getpid()))


def _install(cell: Cell, program: bytes) -> None:
    try:
        cell.listener = seccomp.install(program, notify=True)
    except OSError:
        # Another supervisor outside has the one listener that a process may have: ends are heard of later.
        cell.notifies = False
        cell.listener = seccomp.install(program, notify=False)


def _die_with_parent(cell: Cell) -> None:
    if cell.tier != RESTRICTED:
        return  # the parent is the first process of the pid namespace: the kernel ends all others with it
    kernel.signal_on_parents_death(signal.SIGKILL)
    if os.getppid() != cell.parent:
        os.kill(os.getpid(), signal.SIGKILL)


_ALL = frozenset(TIERS)
_SPACES = frozenset((USERNS, FULL))
_GET_SPACES = (
    "allow unprivileged user namespaces (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; "
    "Docker: --security-opt seccomp=unconfined)"
)
_GET_KERNEL = "use Linux 5.13 or newer, with it switched on"

LAYERS: tuple[Layer, ...] = (
    Layer("oom", frozenset(), "mount /proc writable", {Stage.OUTER: _yield_when_memory_is_short}),
    Layer(
        "cgroup",
        frozenset((FULL,)),
        "run as root where the cgroup file system is writable, or have a group with memory and pids delegated",
        {Stage.KEEPER: _join_groups, Stage.CHILD: _join_memory_group},
    ),
    Layer("user", _SPACES, _GET_SPACES, {Stage.OUTER: _user_namespace, Stage.SLOT: _nested_user_namespace}),
    Layer("pid", _SPACES, _GET_SPACES, {Stage.OUTER: _pid_namespace, Stage.SLOT: _pid_namespace}),
    Layer("net", _SPACES, _GET_SPACES, {Stage.OUTER: _net_namespace, Stage.SLOT: _net_namespace}),
    Layer("ipc", _SPACES, _GET_SPACES, {Stage.OUTER: _ipc_namespace, Stage.SLOT: _ipc_namespace}),
    Layer("uts", _SPACES, _GET_SPACES, {Stage.OUTER: _uts_namespace}),
    Layer("mount", _SPACES, _GET_SPACES, {Stage.OUTER: _mount_namespace, Stage.SLOT: _mount_namespace}),
    Layer("tree", _SPACES, _GET_SPACES, {Stage.OUTER: _look_up_the_tree, Stage.ZYGOTE: _build_the_tree}),
    Layer(
        "proc",
        frozenset(),
        "leave /proc unmasked in the container",
        {Stage.ZYGOTE: _visible_proc, Stage.KEEPER: _own_proc},
    ),
    Layer("root", _SPACES, _GET_SPACES, {Stage.ZYGOTE: _read_only_root}),
    Layer("disk", _SPACES, _GET_SPACES, {Stage.KEEPER: _disk}),
    Layer("session", _ALL, "", {Stage.CHILD: _session}),
    Layer("rlimits", _ALL, "raise the hard limits of the calling process", {Stage.KEEPER: _fixed_limits}),
    Layer(
        "uid",
        frozenset((FULL,)),
        "run as root, and let others read the interpreter and its packages (chmod -R o+rX)",
        {Stage.KEEPER: _give_folder_away, Stage.CHILD: _own_user},
    ),
    Layer("no_new_privs", _ALL, _GET_KERNEL, {Stage.KEEPER: _no_new_privs}),
    Layer("capabilities", _ALL, _GET_KERNEL, {Stage.KEEPER: _no_more_capabilities, Stage.CHILD: _no_capabilities}),
    Layer("landlock", frozenset((RESTRICTED,)), _GET_KERNEL, {Stage.KEEPER: _landlock}),
    Layer("seccomp", _ALL, _GET_KERNEL, {Stage.KEEPER: _seccomp_for_the_slot, Stage.CHILD: _seccomp_for_one_process}),
    Layer("parent_death", _ALL, "", {Stage.CHILD: _die_with_parent}),
)
"""In the order in which they are applied within a stage."""

_NEEDS_SPACES = frozenset(["tree", "cgroup", "user", "pid", "net", "ipc", "uts", "mount", "proc", "root", "disk"])


def home(sources: list[str]) -> str:
    """Where a run's disk goes: not over packages that lie below /tmp."""
    real = tree.resolved(sources)
    free = [folder for folder in HOMES if not any(path.startswith(folder + "/") for path in real)]
    return (free or HOMES)[0]


def candidates(tier: str) -> set[str]:
    """Names of the layers to try for USERNS and above, or for RESTRICTED."""
    return {layer.name for layer in LAYERS if tier != RESTRICTED or layer.name not in _NEEDS_SPACES}


def tier_of(layers: Iterable[str]) -> str:
    """The strongest tier whose layers are all there; empty where not even the weakest is."""
    there = frozenset(layers)
    reached = ""
    for tier in TIERS:
        if all(layer.name in there for layer in LAYERS if tier in layer.tiers):
            reached = tier
    return reached


# -- the limits of one run ---------------------------------------------------------------------------------------------


def limit_run(
    cell: Cell, cpu_s: float, memory_bytes: int, file_bytes: int, processes: int, *, again: bool = False
) -> None:
    """What a child's processes may use, the last step before the code. CPU seconds are each process's; the supervisor's
    wall clock comes first, and this ends a run whose supervisor is gone. ``again``: the process has run code before, so
    it cannot get more than it had, but for CPU time, of which it has used some."""
    if cell.tier != RESTRICTED and file_bytes >= cell.file_mb << 20:
        file_bytes += 1 << 20  # a file that may fill the disk ends at the disk's size, with the error that says so
    space = cell.address_space + memory_bytes
    _limit(resource.RLIMIT_AS, space, space + MEMORY_RESERVE_BYTES, again)
    _limit(resource.RLIMIT_FSIZE, file_bytes, file_bytes, again)
    if cell.counts_processes:
        # The keeper counts too where it has the same user.
        _limit(resource.RLIMIT_NPROC, processes + 1, processes + 1, again)
    seconds = math.ceil(min(time.process_time() + cpu_s, MAX_CPU_S - 2.0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY if cell.stays else seconds + 1))


def _limit(kind: int, soft: int, hard: int, again: bool) -> None:
    if again:
        most = resource.getrlimit(kind)[1]
        soft, hard = min(soft, most), most
    resource.setrlimit(kind, (soft, hard))


def release_memory_reserve() -> None:
    """Let a program that ran out of memory print its traceback."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
