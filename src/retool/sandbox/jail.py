"""What contains one run of code: an ordered list of steps that a child applies to itself before it gets the code.

This is the tier ``process``. It stops accidents and the common ways to go wrong: endless loops, memory and output
bombs, huge files, stray daemons, leaked secrets in the environment, state that survives into the next run.

Not covered, because it needs namespaces, seccomp, Landlock or a user of its own (the next tier):

- The network is open, and so is every unix socket that the user may open.
- The file system is the machine's: code may read what the user may read, and write what the user may write.
- Processes of the same user may be signalled, the zygote and the trainer included (``kill(-1)`` too). A killed zygote
  is started again; a killed trainer is dead.
- The trainer's ``/proc/<pid>/environ`` can be read where it runs as a normal user; as root the
  dropped capabilities hide it.
- The number of processes is not limited: RLIMIT_NPROC counts all processes of the user, the trainer's threads
  included, and is ignored for root. A fork bomb runs until its deadline; one that also calls setsid can outrun the
  killing.
- The memory limit holds for each process, not for the run's sum; the disk is limited for each file, not for the sum.
- Shared memory (SysV, /dev/shm) stays behind.
- No system call is filtered.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

FILE_BYTES = 64 << 20
"""Largest file that a run may write: ours, far above what a computation needs, far below a disk."""
OPEN_FILES = 256
"""Open descriptors: enough for a pool of processes, and small next to the usual limit of 1024."""
MEMORY_RESERVE_BYTES = 64 << 20
"""Address space kept back for printing the traceback of a MemoryError."""
MAX_CPU_S = 2**31
"""What fits into every kernel's RLIMIT_CPU."""

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
# linux/capability.h: _LINUX_CAPABILITY_VERSION_3 has 64 bits in two words of (effective, permitted, inheritable)
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Cell:
    """What the steps need to know about one child."""

    folder: str
    """Its private working folder; exists, empty."""
    address_space: int
    """Bytes of address space, what the zygote mapped already included."""
    parent: int
    """The zygote's pid."""


@dataclass(frozen=True)
class Step:
    name: str
    apply: Callable[[Cell], None]
    required: bool = True
    """A step that is not required is left out, and not listed, where a trial at start shows that it fails."""


def prctl(option: int, value: int) -> None:
    """Raises: OSError where the kernel refuses."""
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(parent: int, how: int) -> None:
    """Get signal ``how`` when the thread that forked this process ends, or at once if it has ended already."""
    prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:
        os.kill(os.getpid(), how)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none escapes by a double fork."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _session(cell: Cell) -> None:
    os.setsid()


def _folder(cell: Cell) -> None:
    os.chdir(cell.folder)
    os.umask(0o077)


def _environment(cell: Cell) -> None:
    # The zygote was started with a clean environment; only these differ from child to child.
    os.environ["HOME"] = os.environ["TMPDIR"] = os.environ["PWD"] = cell.folder


def _rlimits(cell: Cell) -> None:
    set_limit = resource.setrlimit
    set_limit(resource.RLIMIT_CORE, (0, 0))
    set_limit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    set_limit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    set_limit(resource.RLIMIT_AS, (cell.address_space, cell.address_space + MEMORY_RESERVE_BYTES))


def _oom_first(cell: Cell) -> None:
    # When the machine itself runs out of memory the kernel shall take the run, not the trainer.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _adopt(cell: Cell) -> None:
    # While the run lives its orphans stay below it; so an orphan that reaches the zygote belongs to a run that is over.
    adopt_orphans()


def _no_new_privs(cell: Cell) -> None:
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _capabilities(cell: Cell) -> None:
    # After no_new_privs: else a root process would get them back by exec. Without CAP_SYS_RESOURCE root cannot raise
    # its limits again; without CAP_SYS_PTRACE it cannot look into processes that have capabilities.
    head = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(head, (ctypes.c_uint32 * 6)()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _parent_death(cell: Cell) -> None:
    die_with_parent(cell.parent, signal.SIGKILL)


STEPS: tuple[Step, ...] = (
    Step("session", _session),
    Step("folder", _folder),
    Step("environment", _environment),
    Step("rlimits", _rlimits),
    Step("oom", _oom_first, required=False),
    Step("subreaper", _adopt),
    Step("no_new_privs", _no_new_privs),
    Step("capabilities", _capabilities, required=False),
    Step("parent_death", _parent_death),
)
"""In the order in which they are applied."""


def enter(cell: Cell, names: frozenset[str]) -> None:
    """Apply the steps called ``names``, in order.

    Raises:
        OSError: a step failed; no code may run then.
    """
    for step in STEPS:
        if step.name in names:
            step.apply(cell)


def limit_cpu(timeout_s: float) -> None:
    """The last step, applied when the child knows its deadline: CPU seconds on all cores together, rounded up.

    The supervisor's wall clock comes first; this ends a run whose supervisor is gone."""
    seconds = min(timeout_s * (os.cpu_count() or 1), float(MAX_CPU_S - 2))
    soft = math.ceil(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))


def release_memory_reserve() -> None:
    """Let a program that ran out of memory print its traceback."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
