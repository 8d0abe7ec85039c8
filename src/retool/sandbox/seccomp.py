"""System call filters: load one, put it on this process, and answer what it reports.

The programs lie in ``filters/*.bpf`` and are made by ``filters/generate.py``, which holds the policy; nothing but the
kernel is needed here. There are two variants: ``namespaced`` where user, pid, mount and network namespaces do the
containing, and ``restricted`` where they are not to be had and the filter also has to stop new processes, signals to
others, sockets, and what Landlock does not cover.

Every filter reports ``exit_group(NOTIFY_BASE + n)`` for ``n < NOTIFY_SPAN``: the process stops there until whoever
holds the listener has answered. Filtered code can make that call too, at any time and from any of its processes: a
notification is a claim, not a proof.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

NOTIFY_BASE = 0x52540000
"""First exit status that is reported: far from what anyone passes to exit, and of what follows the kernel would keep
the lowest 8 bits. A multiple of NOTIFY_SPAN, for the filter compares under a mask."""
NOTIFY_SPAN = 0x200
SELF_PID = 0x5E1F0001
"""Stands in a filter for the pid of the process that it will be put on: a filter cannot ask who calls. Above the
kernel's largest pid (2**22), so a filter that nobody ran through ``for_process`` lets no process signal any."""

# linux/seccomp.h
_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 1 << 3
_NOTIFY_CONTINUE = 1
_IOCTL_RECV = 0xC0502100
_IOCTL_SEND = 0xC0182101
_IOCTL_ADDFD = 0x40182103
_NOTIF = struct.Struct("=QIIiIQ6Q")
"""struct seccomp_notif: id, pid, flags, then struct seccomp_data: nr, arch, instruction pointer, six arguments."""
_RESP = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, val, error, flags."""
_ADDFD = struct.Struct("=QIIII")
"""struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags."""
_EMPTY_NOTIF = bytes(_NOTIF.size)
"""The kernel refuses a receive buffer that is not zero; ioctl copies this one and leaves it as it is."""

# linux/filter.h: struct sock_filter is code, jt, jf, k
_INSTRUCTION = struct.Struct("=HBBI")
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_SELF_PID_WORD = struct.pack("=I", SELF_PID)

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}  # asm/unistd.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Notification(NamedTuple):
    """One call that waits for an answer."""

    id: int
    pid: int
    """Of the thread that called, in the pid namespace of whoever receives; 0 if it is not to be seen from there."""
    nr: int
    args0: int
    """First argument, its lower 32 bits: what the kernel would take for an int."""


def _machine(name: str | None) -> str:
    name = name or os.uname().machine
    machine = _MACHINES.get(name.lower())
    if machine is None:
        raise OSError(errno.ENOSYS, f"there is no system call filter for the machine {name!r}")
    return machine


def load(variant: str, machine: str | None = None) -> bytes:
    """The program of a variant, as the kernel takes it but for SELF_PID; ``machine`` is this one unless given.

    Raises: OSError where there is none."""
    machine = _machine(machine)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "filters", f"{variant}.{machine}.bpf")
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"there is no system call filter {variant!r} for the machine {machine}") from None


def for_process(program: bytes, pid: int) -> bytes:
    """The program for the process ``pid`` (as that process sees itself): every comparison with SELF_PID gets it."""
    made = bytearray(program)
    at = program.find(_SELF_PID_WORD)
    while at >= 0:
        start = at - 4
        if start % _INSTRUCTION.size == 0:
            code, if_true, if_false, _ = _INSTRUCTION.unpack_from(program, start)
            if code == _JUMP_IF_EQUAL:
                _INSTRUCTION.pack_into(made, start, code, if_true, if_false, pid)
        at = program.find(_SELF_PID_WORD, at + 1)
    return bytes(made)


def install(program: bytes, *, notify: bool) -> int | None:
    """Put the filter on this thread and on all that it starts from now on, for good; no_new_privs must be set.

    Returns the listener (closed on exec) with ``notify``. Without one, and once every copy of it is closed, a reported
    call fails with ENOSYS. A process under a filter with a listener can get no second listener (EBUSY).

    Raises: OSError where the kernel refuses, or this machine has no filter."""
    number = _SYS_SECCOMP[_machine(None)]
    head = _Program(len(program) // _INSTRUCTION.size, program)
    flags = _FLAG_NEW_LISTENER if notify else 0
    result: int = _libc.syscall(
        ctypes.c_long(number), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(flags), ctypes.byref(head)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result if notify else None


def receive(fd: int) -> Notification | None:
    """The next notification of a listener that poll called readable; else this may block.

    None where there is none after all: the caller was killed in between, or a signal came here."""
    try:
        raw = fcntl.ioctl(fd, _IOCTL_RECV, _EMPTY_NOTIF)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
            return None
        raise
    fields = _NOTIF.unpack(raw)
    return Notification(fields[0], fields[1], fields[3], fields[6] & 0xFFFFFFFF)


def answer(fd: int, id: int, *, value: int = 0, error: int = 0, go_on: bool = False) -> bool:
    """End a call that waits: it returns ``value``, or fails with the errno ``error`` (positive), or, with ``go_on``,
    is carried out as if it had not been reported.

    False where nobody waits any more: the process was killed, or a signal broke off its call (which it may repeat
    under another id)."""
    data = _RESP.pack(id, 0, 0, _NOTIFY_CONTINUE) if go_on else _RESP.pack(id, value, -error, 0)
    try:
        fcntl.ioctl(fd, _IOCTL_SEND, data)
    except FileNotFoundError:
        return False
    return True


def add_fd(fd: int, id: int, source_fd: int) -> int | None:
    """Give a process whose call waits a copy of ``source_fd``, closed on exec; its number over there.

    None where nobody waits any more.

    Raises: OSError, e.g. EMFILE where the other process has no descriptor left, which it can bring about at will."""
    while True:
        # A mutable buffer, for else ioctl returns the buffer and not the number.
        data = bytearray(_ADDFD.pack(id, 0, source_fd, 0, os.O_CLOEXEC))
        try:
            number: int = fcntl.ioctl(fd, _IOCTL_ADDFD, data, True)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                return None
            if error.errno != errno.EINTR:  # a signal here: the kernel has taken the request back
                raise
        else:
            return number
