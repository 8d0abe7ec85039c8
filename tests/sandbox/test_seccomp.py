"""The filters: what the programs in the repository say, by an interpreter for both architectures, and what the kernel
does with them on this machine."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from retool.sandbox import seccomp
from retool.sandbox.filters import generate
from retool.sandbox.filters.generate import ALLOW, ARCHITECTURES, ENOSYS, EPERM, NOTIFY, VARIANTS
from retool.sandbox.seccomp import NOTIFY_BASE, NOTIFY_SPAN, SELF_PID

X32 = 0x40000000
I386 = 0x40000003  # AUDIT_ARCH_I386
ARM = 0x40000028  # AUDIT_ARCH_ARM
HIGH = 0xDEADBEEF << 32
"""What a caller may put above an int."""
PID = 4242

_NUMBERS = """
    accept 43 202, bind 49 200, bpf 321 280, capset 126 91, chmod 90 -, chroot 161 51, clone 56 220, clone3 435 435,
    connect 42 203, execve 59 221, execveat 322 281, exit 60 93, exit_group 231 94, fchmod 91 52, fchmodat2 452 452,
    fcntl 72 25, fork 57 -, ftruncate 77 46, futex 202 98, inotify_init1 294 26, io_setup 206 0,
    io_uring_setup 425 425, ioctl 16 29, keyctl 250 219, kill 62 129, memfd_create 319 279, mknod 133 -,
    mknodat 259 33, mmap 9 222, mount 165 40, open 2 -, openat 257 56, openat2 437 437, perf_event_open 298 241,
    personality 135 92, pidfd_getfd 438 438, pidfd_open 434 434, pidfd_send_signal 424 424, prctl 157 167,
    prlimit64 302 261, process_vm_readv 310 270, ptrace 101 117, read 0 63, recvmsg 47 212, renameat2 316 276,
    rseq 334 293, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, sched_setaffinity 203 122, seccomp 317 277,
    sendmsg 46 211, setns 308 268, setpriority 141 140, setresuid 117 147, setsockopt 54 208, setxattr 188 5,
    shmget 29 194, socket 41 198, socketpair 53 199, statfs 137 43, statx 332 291, tgkill 234 131, tkill 200 130,
    truncate 76 45, unlinkat 263 35, unshare 272 97, userfaultfd 323 282, utimensat 280 88, vfork 58 -, wait4 61 260,
    write 1 64
"""
"""Name, number on x86_64, on aarch64; a dash where there is no such call."""
NUMBERS = {
    name: tuple(None if number == "-" else int(number) for number in numbers)
    for name, *numbers in (entry.split() for entry in _NUMBERS.split(","))
}
MACHINES = tuple(ARCHITECTURES)


def number_of(name: str, machine: str) -> int | None:
    return NUMBERS[name][MACHINES.index(machine)]


def evaluate(program: bytes, arch: int, nr: int, *args: int) -> int:
    """What the program returns for one call: classic BPF, as much of it as a filter of ours uses."""
    full = [value & (1 << 64) - 1 for value in (*args, *[0] * (6 - len(args)))]
    data = struct.pack("<II7Q", nr & 0xFFFFFFFF, arch, 0, *full)
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == 0x20:  # LD | W | ABS
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif operation == 0x54:  # ALU | AND | K
            accumulator &= k
        elif operation == 0x05:  # JMP | JA
            at += k
        elif operation == 0x06:  # RET | K
            return int(k)
        else:
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: accumulator & k}
            at += if_true if holds[operation] else if_false


def decide(variant: str, machine: str, name: str, *args: int) -> int | None:
    """The action for a call by name, for a process PID; None where the architecture has no such call."""
    nr = number_of(name, machine)
    program = seccomp.for_process(seccomp.load(variant, machine), PID)
    return None if nr is None else evaluate(program, ARCHITECTURES[machine], nr, *args)


BOTH: list[tuple[str, tuple[int, ...], int]] = [
    *((name, (), ALLOW) for name in ("read", "write", "mmap", "futex", "statx", "exit", "wait4", "rseq", "ftruncate")),
    *((name, (), ALLOW) for name in ("setresuid", "capset", "sendmsg", "recvmsg", "unlinkat", "renameat2", "statfs")),
    *((name, (), EPERM) for name in ("ptrace", "process_vm_readv", "pidfd_getfd", "mount", "chroot", "unshare")),
    *((name, (), EPERM) for name in ("setns", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_setup")),
    *((name, (), EPERM) for name in ("keyctl", "memfd_create", "shmget", "seccomp", "execveat", "inotify_init1")),
    ("clone3", (), ENOSYS),
    ("fchmodat2", (), ENOSYS),
    *(("exit_group", (status,), ALLOW) for status in (0, 1, 7, 255, -1, NOTIFY_BASE - 1, NOTIFY_BASE + NOTIFY_SPAN)),
    *(("exit_group", (status,), NOTIFY) for status in (NOTIFY_BASE, NOTIFY_BASE + 7, NOTIFY_BASE + NOTIFY_SPAN - 1)),
    ("exit_group", (HIGH | NOTIFY_BASE,), NOTIFY),
    ("exit_group", (HIGH | 7,), ALLOW),
    ("prctl", (15,), ALLOW),  # PR_SET_NAME
    *(("prctl", (high | option,), EPERM) for option in (22, 35, 62) for high in (0, HIGH)),
    ("personality", (0xFFFFFFFF,), ALLOW),
    ("personality", (0,), ALLOW),
    ("personality", (0x0040000,), EPERM),  # ADDR_NO_RANDOMIZE
    *(("mknodat", (0, 0, mode | 0o600), ALLOW) for mode in (0, 0o100000, 0o010000, 0o140000)),
    *(("mknodat", (0, 0, high | mode | 0o600), EPERM) for mode in (0o020000, 0o060000) for high in (0, HIGH)),
    ("mknod", (0, 0o010600), ALLOW),
    ("mknod", (0, 0o020600), EPERM),
    ("setpriority", (0, 0, 5), ALLOW),
    ("setpriority", (0, 1, 5), EPERM),
    ("setpriority", (2, 0, 5), EPERM),
    ("sched_setaffinity", (0,), ALLOW),
    ("sched_setaffinity", (PID + 1,), EPERM),
    ("prlimit64", (0,), ALLOW),
    ("prlimit64", (PID + 1,), EPERM),
    ("setsockopt", (3, 1, 7), ALLOW),
    *(("setsockopt", (3, 1, option), EPERM) for option in (26, 50, 51, 52)),
    ("ioctl", (0, 0x541B), ALLOW),  # FIONREAD
    *(("ioctl", (0, high | request), EPERM) for request in (0x5412, 0x541C, 0x5423, 0x40806685) for high in (0, HIGH)),
    ("fcntl", (0, 2, 1), ALLOW),  # F_SETFD
    *(("socket", (family, 1), EPERM) for family in (2, 10, 16, 17, 38, 40)),
    ("socket", (HIGH | 2, 1), EPERM),
    ("socketpair", (1, 1), ALLOW),
    ("socketpair", (1, 5 | 0o2000000), ALLOW),
    ("socketpair", (2, 1), EPERM),
    *(("clone", (flag,), EPERM) for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000)),
    *(("clone", (0x3D0F00 | flag,), EPERM) for flag in (0x40000000, 0x8000, 0x2000, HIGH | 0x20000)),
    ("clone", (0x3D0F00,), ALLOW),  # pthread_create
]
NAMESPACED: list[tuple[str, tuple[int, ...], int]] = [
    *((name, (), ALLOW) for name in ("fork", "vfork", "execve", "openat2", "connect", "bind", "accept", "pidfd_open")),
    *((name, (PID + 1, 9), ALLOW) for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo")),
    *((name, (), ALLOW) for name in ("chmod", "fchmod", "setxattr", "utimensat", "truncate")),
    ("clone", (0x1200011,), ALLOW),  # fork
    ("clone", (0x11 | 0x80,), ALLOW),
    ("socket", (1, 1), ALLOW),
    ("socketpair", (1, 2), ALLOW),
    ("fcntl", (0, 8, 1), ALLOW),
    ("openat", (0, 0, 0o1000), ALLOW),
    ("sched_setaffinity", (PID,), EPERM),
]
RESTRICTED: list[tuple[str, tuple[int, ...], int]] = [
    *((name, (), EPERM) for name in ("fork", "vfork", "execve", "connect", "bind", "accept", "pidfd_open", "tkill")),
    *((name, (), EPERM) for name in ("rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")),
    *((name, (), EPERM) for name in ("chmod", "fchmod", "setxattr", "utimensat", "truncate")),
    ("openat2", (), ENOSYS),
    ("clone", (0x1200011,), EPERM),
    ("clone", (HIGH | 0x11,), EPERM),
    *(("kill", (pid, 9), ALLOW) for pid in (0, PID, HIGH | PID)),
    *(("kill", (pid, 9), EPERM) for pid in (1, PID + 1, -1, -PID, SELF_PID)),
    ("tgkill", (PID, 1, 9), ALLOW),
    *(("tgkill", (pid, PID, 9), EPERM) for pid in (0, 1, -1, SELF_PID)),
    ("prlimit64", (PID,), ALLOW),
    ("sched_setaffinity", (PID,), ALLOW),
    ("socket", (1, 1), EPERM),
    *(("socketpair", (1, kind), EPERM) for kind in (2, 3, 2 | 0o2000000, HIGH | 2)),
    *(("fcntl", (0, command, 1), EPERM) for command in (8, 15, 10, 1024)),
    *(("ioctl", (0, request), EPERM) for request in (0x8901, 0x8902)),
    *(("openat", (0, 0, flags), ALLOW) for flags in (0, 1 | 0o1100, 2 | 0o1000, 0o2000000)),
    *(("openat", (0, 0, flags), EPERM) for flags in (0o1000, 0o1100, HIGH | 0o1000, 3, 3 | 0o1000)),
    ("open", (0, 1 | 0o1100), ALLOW),
    ("open", (0, 0o1000), EPERM),
]
EXPECTED = [(variant, *case) for variant in VARIANTS for case in BOTH]
EXPECTED += [("namespaced", *case) for case in NAMESPACED] + [("restricted", *case) for case in RESTRICTED]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("variant", "name", "args", "action"), EXPECTED)
def test_action(variant: str, machine: str, name: str, args: tuple[int, ...], action: int) -> None:
    found = decide(variant, machine, name, *args)
    assert found is None or hex(found) == hex(action)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_foreign_and_nothing_new_is_allowed(variant: str, machine: str) -> None:
    program, arch = seccomp.load(variant, machine), ARCHITECTURES[machine]
    for nr in (0, 1, 11, 39, 64, 231):
        for foreign in (I386, ARM, *(set(ARCHITECTURES.values()) - {arch})):
            assert evaluate(program, foreign, nr) == EPERM
        assert machine != "x86_64" or evaluate(program, arch, X32 | nr) == EPERM
    for nr in (*range(451, 1024), X32 - 1, 0x7FFFFFFF, 0xFFFFFFFF):
        assert evaluate(program, arch, nr) not in (ALLOW, NOTIFY)
    assert {evaluate(program, arch, nr) for nr in range(451, 1024)} == {ENOSYS}


def modelled(call: generate.Call, args: list[int]) -> int:
    for rule in call.rules:
        if all(args[test.arg] & test.mask == test.value for test in rule.tests):
            return rule.action
    return call.otherwise


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_programs_do_what_the_policy_says(variant: str, machine: str) -> None:
    """For every call of NUMBERS that the policy names, with arguments around everything that its rules look for."""
    program, arch = seccomp.load(variant, machine), ARCHITECTURES[machine]
    draw = random.Random(0)
    policy = generate.policy(variant)
    checked = 0
    for name in NUMBERS:
        nr = number_of(name, machine)
        call = policy.get(name, generate.Call(ENOSYS))
        if nr is None:
            continue
        tests = [test for rule in call.rules for test in rule.tests]
        values = [value for test in tests for value in (test.value, test.mask, test.value + 1, test.value - 1)]
        for _ in range(300 if tests else 3):
            args = [draw.choice([*values, 0, draw.getrandbits(32)]) & 0xFFFFFFFF for _ in range(6)]
            args = [value ^ (draw.choice([0, 0, 1]) << draw.randrange(64)) for value in args]
            assert evaluate(program, arch, nr, *args) == modelled(call, args), (name, [hex(arg) for arg in args])
            checked += 1
    assert checked > 3000


def test_every_self_pid_is_replaced() -> None:
    for machine in MACHINES:
        program = seccomp.load("restricted", machine)
        word = struct.pack("=I", SELF_PID)
        made = seccomp.for_process(program, PID)
        assert program.count(word) >= 2  # of a pid alone, and of a pid or 0
        assert word not in made
        assert len(made) == len(program)
        assert seccomp.for_process(made, 1) == made
        assert seccomp.load("namespaced", machine).count(word) == 0


def test_load_knows_other_names_of_machines_and_says_what_is_missing() -> None:
    assert seccomp.load("namespaced", "arm64") == seccomp.load("namespaced", "aarch64")
    assert seccomp.load("namespaced", "AMD64") == seccomp.load("namespaced", "x86_64")
    with pytest.raises(OSError, match="no system call filter for the machine 'riscv64'"):
        seccomp.load("namespaced", "riscv64")
    with pytest.raises(OSError, match="no system call filter 'other' for the machine x86_64"):
        seccomp.load("other", "x86_64")


def libseccomp() -> generate.Libseccomp:
    try:
        return generate.Libseccomp()
    except OSError:
        pytest.skip("libseccomp.so.2 is not installed")


def test_the_files_are_what_the_policy_gives() -> None:
    library = libseccomp()
    if library.version() != generate.MADE_WITH:
        pytest.skip(f"libseccomp {library.version()} may order instructions differently from {generate.MADE_WITH}")
    for name, program in generate.build(library).items():
        variant, machine, _ = name.split(".")
        assert seccomp.load(variant, machine) == program, f"{name}: run retool.sandbox.filters.generate"


def test_the_numbers_of_this_file() -> None:
    libseccomp()
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch
    for name, numbers in NUMBERS.items():
        for arch, number in zip(ARCHITECTURES.values(), numbers, strict=True):
            found = resolve(ctypes.c_uint32(arch), name.encode())
            if found != -1:  # newer than the library
                assert number == (found if found >= 0 else None), name


# What the kernel does

FOLDER = str(Path(seccomp.__file__).parent)
PRELUDE = f"""
import ctypes, errno, os, signal, sys
sys.path.insert(0, {FOLDER!r})
import seccomp
del sys.path[0]
variant = sys.argv[1]
os.setsid()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
seccomp.install(seccomp.for_process(seccomp.load(variant), os.getpid()), notify=False)

def refused(call, *args):
    try:
        call(*args)
    except PermissionError:
        return
    raise SystemExit(f"{{call}}{{args}} was not refused")

def fails(code, name, *args):
    result = getattr(libc, name)(*args)
    assert result == -1 and ctypes.get_errno() == code, (name, args, result, ctypes.get_errno())
"""


def available() -> str:
    """Why the kernel's part cannot be tested; empty where it can."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return "no system call filter for this machine"
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(NOTIFY)
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    # SECCOMP_GET_ACTION_AVAIL
    if libc.syscall(ctypes.c_long(number), ctypes.c_ulong(2), ctypes.c_ulong(0), ctypes.byref(action)) != 0:
        return f"this kernel has no seccomp notifications: {os.strerror(ctypes.get_errno())}"
    return ""


live = pytest.mark.skipif(bool(available()), reason=available() or "available")


def confined(variant: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter under the filter."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, variant],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


# As root and without a filter most of these would succeed: each has to be one that then changes nothing outside.
PROBES = {
    "network": "import socket\nfor f in (2, 10, 16, 17): refused(socket.socket, f, socket.SOCK_STREAM)",
    "ptrace": "fails(errno.EPERM, 'ptrace', 0, 0, 0, 0)",
    "unshare": "fails(errno.EPERM, 'unshare', 0x10000000)",
    "mount": "fails(errno.EPERM, 'mount', b'none', b'/nowhere', b'tmpfs', 0, 0)",
    "memfd": "refused(os.memfd_create, 'x')",
    "device": "refused(os.mknod, '/nowhere/x', 0o020600, 0x103)",
    "another filter": "refused(lambda: seccomp.install(seccomp.load(variant), notify=False))",
    "clone with namespaces": (
        "nr = 56 if os.uname().machine == 'x86_64' else 220\n"
        "fails(errno.EPERM, 'syscall', nr, ctypes.c_long(0x10000211), 0, 0, 0, 0)"
    ),
    "clone3": "fails(errno.ENOSYS, 'syscall', 435, 0, 0)",
    "threads": (
        "import threading\nseen = []\nall_ = [threading.Thread(target=seen.append, args=(n,)) for n in range(20)]\n"
        "[t.start() for t in all_]; [t.join() for t in all_]\nassert sorted(seen) == list(range(20))"
    ),
    "numbers": "import numpy, sympy\nassert numpy.linalg.inv(numpy.eye(50)).trace() == 50\n"
    "assert str(sympy.sympify('integrate(x**2*exp(x), x)')).startswith('(x**2')",
    "files": (
        "import sqlite3, tempfile, zlib\nwith tempfile.TemporaryDirectory() as folder:\n"
        "    with open(folder + '/a', 'wb') as f: f.write(zlib.compress(b'x' * 10**6))\n"
        "    base = sqlite3.connect(folder + '/base'); base.execute('create table t (x)')\n"
        "    base.execute('insert into t values (1)'); base.commit()\n"
        "    assert base.execute('select x from t').fetchall() == [(1,)]; base.close()"
    ),
    "asyncio": "import asyncio\nasyncio.run(asyncio.wait_for(asyncio.to_thread(sum, [1]), 60))",
    "own limits": "import resource as r\nr.setrlimit(r.RLIMIT_CORE, (0, 0)); refused(r.prlimit, os.getppid(), 0)",
    "own priority": (
        "os.nice(1); parent = os.getppid()\nrefused(os.setpriority, os.PRIO_PROCESS, parent, os.getpriority(0, parent))"
    ),
}


@live
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("probe", PROBES)
def test_probe(variant: str, probe: str) -> None:
    result = confined(variant, PROBES[probe])
    assert (result.returncode, result.stderr) == (0, "")


ONE_VARIANT = {
    ("namespaced", "subprocess"): (
        "import subprocess\nassert subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True)"
        ".stdout == b'1\\n'\nassert os.system('exit 3') == 3 << 8"
    ),
    ("namespaced", "multiprocessing"): (
        "import multiprocessing as m\ncontext = m.get_context('fork')\n"
        "with context.Pool(3) as pool: assert pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))\n"
        "with context.Manager() as manager: assert manager.dict(a=1).copy() == {'a': 1}\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "with ProcessPoolExecutor(2, mp_context=m.get_context('spawn')) as pool: assert pool.submit(abs, -1).result()"
    ),
    ("namespaced", "asyncio subprocess"): (
        "import asyncio\nasync def main():\n    p = await asyncio.create_subprocess_exec(sys.executable, '-c', '')\n"
        "    assert await p.wait() == 0\nasyncio.run(main())"
    ),
    ("namespaced", "unix sockets"): (
        "import socket, tempfile\nwith tempfile.TemporaryDirectory() as folder:\n"
        "    a = socket.socket(socket.AF_UNIX); a.bind(folder + '/s'); a.listen()\n"
        "    b = socket.socket(socket.AF_UNIX); b.connect(folder + '/s'); a.accept()[0].send(b'x')\n"
        "    assert b.recv(1) == b'x'"
    ),
    ("namespaced", "what the keeper does"): (
        "import socket, tempfile\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "socket.send_fds(a, [b'x'], [0]); assert len(socket.recv_fds(b, 9, 1)[1]) == 1\n"
        "folder = tempfile.mkdtemp(); os.chmod(folder, 0o755); os.statvfs(folder); open(folder + '/x', 'w').close()\n"
        "os.rename(folder + '/x', folder + '/y'); os.unlink(folder + '/y'); os.rmdir(folder)\n"
        "how = (ctypes.c_uint64 * 3)(); assert libc.syscall(437, -100, b'/', how, ctypes.c_size_t(24)) >= 0\n"
        "os.setresgid(-1, -1, -1); os.setresuid(-1, -1, -1)\n"
        "if os.geteuid() == 0: os.setgroups(os.getgroups())\n"
        "pid = os.fork()\nif pid == 0: signal.pause()\nos.kill(pid, 9); assert os.waitpid(pid, 0)[1] == 9\n"
        "assert libc.prctl(36, ctypes.c_ulong(1), 0, 0, 0) == 0\n"
        "head = (ctypes.c_uint32 * 2)(0x20080522, 0)\nassert libc.capset(head, (ctypes.c_uint32 * 6)()) == 0"
    ),
    ("restricted", "no new processes"): (
        "import subprocess\nrefused(os.fork); refused(subprocess.run, [sys.executable, '-c', ''])\n"
        "refused(os.execv, sys.executable, [sys.executable])"
    ),
    ("restricted", "no signals to others"): (
        "refused(os.kill, os.getppid(), 0); refused(os.kill, -1, 0); refused(os.kill, 1, 0)\n"
        "refused(os.pidfd_open, os.getppid())\nos.kill(os.getpid(), 0); os.kill(0, 0)\n"
        "import fcntl\nfor c in (8, 10, 15): refused(fcntl.fcntl, 0, c, os.getppid())"
    ),
    ("restricted", "sockets"): (
        "import socket\nrefused(socket.socket, socket.AF_UNIX)\n"
        "refused(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
        "refused(a.connect, '/nowhere/x'); refused(a.bind, '/nowhere/x')"
    ),
    ("restricted", "files of others"): (
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x'); f.flush()\n"
        "    for call, *rest in ((os.chmod, 0o777), (os.chown, -1, -1), (os.utime,), (os.truncate, 0)):\n"
        "        refused(call, f.name, *rest)\n    refused(os.fchmod, f.fileno(), 0o777)\n"
        "    refused(os.open, f.name, os.O_RDONLY | os.O_TRUNC); assert os.stat(f.name).st_size == 1\n"
        "    refused(os.setxattr, f.name, 'user.x', b''); os.close(os.open(f.name, os.O_WRONLY | os.O_TRUNC))\n"
        "    f.truncate(0)"
    ),
}


@live
@pytest.mark.parametrize(("variant", "what"), ONE_VARIANT)
def test_probe_of_one_variant(variant: str, what: str) -> None:
    result = confined(variant, ONE_VARIANT[variant, what])
    assert (result.returncode, result.stderr) == (0, "")


@live
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_program_may_still_kill_itself(variant: str) -> None:
    assert confined(variant, "os.abort()").returncode == -signal.SIGABRT
    assert confined(variant, "os.kill(os.getpid(), 15)").returncode == -signal.SIGTERM


def _child(code: Callable[[], None], link: socket.socket, variant: str) -> NoReturn:
    try:
        os.setsid()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
        program = seccomp.for_process(seccomp.load(variant), os.getpid())
        listener = seccomp.install(program, notify=True)
        assert listener is not None
        assert not os.get_inheritable(listener)
        socket.send_fds(link, [b"x"], [listener])
        os.close(listener)
        code()
        os._exit(0)
    finally:
        os._exit(99)


@contextmanager
def listening(code: Callable[[], None], variant: str) -> Iterator[tuple[int, int]]:
    """Fork a child that runs ``code`` under the filter; its pid and the listener."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _child(code, theirs, variant)
    theirs.close()
    _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    try:
        yield pid, listener
    finally:
        os.close(listener)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def next_notification(listener: int) -> seccomp.Notification:
    assert select.select([listener], [], [], 60)[0]
    notification = seccomp.receive(listener)
    assert notification is not None
    return notification


def ended(pid: int) -> int:
    """The exit code; leaves the zombie, which ``listening`` reaps."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def report(number: int) -> int:
    """In a child: exit_group, which may come back."""
    libc = ctypes.CDLL(None, use_errno=True)
    nr = {"x86_64": 231, "aarch64": 94}[platform.machine()]
    result = int(libc.syscall(ctypes.c_long(nr), ctypes.c_long(NOTIFY_BASE + number)))
    return -ctypes.get_errno() if result == -1 else result


def exit_unless(condition: bool) -> None:
    if not condition:
        os._exit(50)


@live
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exit_is_reported_and_goes_on(variant: str) -> None:
    with listening(lambda: os._exit(NOTIFY_BASE | 7), variant) as (pid, listener):
        found = next_notification(listener)
        assert (found.pid, found.args0) == (pid, NOTIFY_BASE | 7)
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        assert seccomp.answer(listener, found.id, go_on=True)
        assert ended(pid) == 7
        assert not seccomp.answer(listener, found.id)


@live
def test_an_exit_that_is_not_reported() -> None:
    with listening(lambda: os._exit(7), "restricted") as (pid, listener):
        assert ended(pid) == 7
        assert select.select([listener], [], [], 60)[0]  # hung up


@live
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_report_that_is_answered_comes_back(variant: str) -> None:
    def code() -> None:
        exit_unless(report(0x103) == 0)
        exit_unless(report(0x104) == 12)
        exit_unless(report(0x105) == -errno.EDOM)
        os._exit(3)

    with listening(code, variant) as (pid, listener):
        for number, wanted in ((0x103, {}), (0x104, {"value": 12}), (0x105, {"error": errno.EDOM})):
            found = next_notification(listener)
            assert found.args0 == NOTIFY_BASE + number
            assert seccomp.answer(listener, found.id, **wanted)
        assert ended(pid) == 3


@live
def test_killed_while_it_waits() -> None:
    with listening(lambda: os._exit(NOTIFY_BASE), "namespaced") as (pid, listener):
        found = next_notification(listener)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        assert not seccomp.answer(listener, found.id)
        assert seccomp.add_fd(listener, found.id, 0) is None


@live
def test_killed_before_it_is_received() -> None:
    with listening(lambda: os._exit(NOTIFY_BASE), "namespaced") as (pid, listener):
        assert select.select([listener], [], [], 60)[0]
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        assert seccomp.receive(listener) is None


@live
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_descriptor_is_handed_over(variant: str) -> None:
    def code() -> None:
        fd = report(0x100)
        exit_unless(fd > 2 and not os.get_inheritable(fd) and os.read(fd, 9) == b"hello")
        os._exit(4)

    reading, writing = os.pipe()
    os.write(writing, b"hello")
    with listening(code, variant) as (pid, listener):
        found = next_notification(listener)
        number = seccomp.add_fd(listener, found.id, reading)
        assert number is not None
        assert seccomp.answer(listener, found.id, value=number)
        assert ended(pid) == 4
    os.close(reading)
    os.close(writing)


@live
def test_reports_of_descendants_reach_the_listener() -> None:
    def code() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(NOTIFY_BASE + 5)
        exit_unless(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5)
        os._exit(6)

    with listening(code, "namespaced") as (pid, listener):
        found = next_notification(listener)
        assert found.pid != pid
        assert seccomp.answer(listener, found.id, go_on=True)
        assert ended(pid) == 6


@live
def test_install_says_why_not() -> None:
    code = f"import sys\nsys.path.insert(0, {FOLDER!r})\nimport seccomp\nseccomp.install(b'', notify=False)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Invalid argument" in result.stderr
