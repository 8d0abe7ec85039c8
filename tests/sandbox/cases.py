"""What a case is, and the table of all of them (docs/sandbox.md holds it; ``python cases.py`` prints it)."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from typing import Any

from retool.sandbox import jail

TIERS = ("full", "userns", "restricted")
ANY = -1000
"""Any exit code, none included."""

_X86 = platform.machine() == "x86_64"
_NUMBERS = {
    "bpf": (321, 280),
    "clone": (56, 220),
    "clone3": (435, 435),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "mount": (165, 40),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "timer_create": (222, 107),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
}
"""Of system calls, on x86-64 and on aarch64 (asm/unistd.h)."""

TOOLS = """\
import ctypes, errno, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NR = dict(%s)
def call(name, *arguments):
    number = NR[name] if isinstance(name, str) else name
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return 'done' if result >= 0 else errno.errorcode[ctypes.get_errno()]
def tried(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except Exception as error:
        return type(error).__name__
    return 'done'
""" % {name: numbers[0 if _X86 else 1] for name, numbers in _NUMBERS.items()}
"""In front of every case that calls one of these: both return ``done`` or the name of the error."""


@dataclass(frozen=True)
class Ends:
    """What must come of a case, and how the table says it."""

    says: str
    status: str = "ok"
    """One of several, if there is a bar between them; empty where nothing is promised."""
    exit_code: int | None = ANY
    out: str | None = None
    """Pattern for the whole of stdout, white space at its ends aside."""
    err: str = ""
    """Pattern for somewhere in stderr."""
    whole: str | None = None
    """Stdout exactly."""
    whole_err: str | None = None
    truncated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    not_fetched: dict[str, str] = field(default_factory=dict)
    """Patterns."""

    def check(self, answer: dict[str, Any]) -> None:
        shown = {**answer, "stdout": answer["stdout"][:2000], "stderr": answer["stderr"][-2000:]}
        assert answer["status"] in self.status.split("|"), shown
        assert self.exit_code in (ANY, answer["exit_code"]), shown
        assert answer["truncated"] is self.truncated, shown
        assert self.out is None or re.fullmatch(self.out, answer["stdout"].strip(), re.DOTALL), (self.out, shown)
        assert re.search(self.err, answer["stderr"]), shown
        assert self.whole is None or answer["stdout"] == self.whole, shown
        assert self.whole_err is None or answer["stderr"] == self.whole_err, shown
        assert answer["files"] == self.files, shown
        assert set(answer["not_fetched"]) == set(self.not_fetched), shown
        for name, pattern in self.not_fetched.items():
            assert re.search(pattern, answer["not_fetched"][name]), shown


def not_promised(says: str) -> Ends:
    return Ends(f"not promised: {says}", status="")


@dataclass(frozen=True)
class Case:
    number: int
    """1 to 52: the list that the sandbox was built by; above: ours."""
    name: str
    code: str
    ends: Ends
    """In every tier that has nothing of its own."""
    userns: Ends | None = None
    restricted: Ends | None = None
    timeout_s: float = 30.0
    config: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    only: str = ""
    """Machine (``platform.machine()``) that the code is for."""

    def expected(self, tier: str) -> Ends:
        return {"userns": self.userns, "restricted": self.restricted}.get(tier) or self.ends

    def program(self, places: dict[str, str]) -> str:
        """The code, with ``$NAME`` replaced by what the test has set up."""
        code = self.code
        for name, value in places.items():
            code = code.replace(f"${name}", value)
        return TOOLS + code if re.search(r"\b(tried|call|libc)\b", code) else code


@dataclass(frozen=True)
class Elsewhere:
    """A case that takes more than one program: the function that tests it."""

    number: int
    name: str
    says: str
    test: str
    """``file.py::function``."""
    restricted: str = ""


def all_cases() -> list[Case]:
    import cases_jail
    import cases_kernel
    import cases_limits
    import cases_python

    found = [*cases_limits.CASES, *cases_jail.CASES, *cases_kernel.CASES, *cases_python.CASES]
    return sorted(found, key=lambda case: case.number)


def table() -> str:
    """The table of docs/sandbox.md."""
    import cases_elsewhere

    rows: list[tuple[int, str, list[str]]] = []
    for case in all_cases():
        rows.append((case.number, case.name, [case.expected(tier).says for tier in TIERS]))
    for other in cases_elsewhere.CASES:
        rows.append((other.number, other.name, [other.says, other.says, other.restricted or other.says]))
    lines = ["| | the code | `full` | `userns` | `restricted` |", "| --- | --- | --- | --- | --- |"]
    for number, name, cells in sorted(rows, key=lambda row: row[0]):
        # The same as to its left is a sign, which makes the differences stand out.
        short = [cells[0], *("〃" if cells[index] == cells[index - 1] else cells[index] for index in (1, 2))]
        lines.append(f"| {number} | {name} | {' | '.join(short)} |")
    return "\n".join(lines)


LAYERS = {
    "oom": "where the machine runs out of memory, a run is killed first",
    "cgroup": "memory, processes and the share of the CPU of all of a run's processes together",
    "user": "no rights over anything outside",
    "pid": "no process outside can be seen or signalled; all die with the keeper",
    "net": "no network, no abstract sockets of others",
    "ipc": "no shared memory of others",
    "uts": "a host name of its own",
    "mount": "mounts of its own",
    "tree": "interpreter, packages, libraries and five devices, read-only, and nothing else of the machine",
    "proc": "a read-only `/proc` of the slot's own processes",
    "root": "the old file system is gone",
    "disk": "one bounded file system in memory for all that a run may write",
    "session": "no terminal, a process group of its own",
    "rlimits": "descriptors, core files, locked memory, signals; for each run also memory, file size, CPU",
    "uid": "a user of its own for each slot",
    "no_new_privs": "setuid programs give nothing",
    "capabilities": "none, and none to be gained",
    "landlock": "files by an allow-list, no TCP; where the kernel can, no signals and abstract sockets to outside",
    "seccomp": "system calls by an allow-list",
    "parent_death": "a child dies with its keeper",
}
"""What each of the jail's layers does, for the documentation."""


def layers_table() -> str:
    lines = ["| layer | what it does | `full` | `userns` | `restricted` |", "| --- | --- | --- | --- | --- |"]
    for layer in jail.LAYERS:
        used = {tier: layer.name in jail.candidates(tier) for tier in TIERS}
        cells = ["×" if tier in layer.tiers else "+" if used[tier] else "" for tier in TIERS]
        lines.append(f"| `{layer.name}` | {LAYERS[layer.name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(layers_table(), table(), sep="\n\n")
