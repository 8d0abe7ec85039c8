"""The system calls that Python's standard library lacks, each under its own name and with its own errors.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_with_gil = ctypes.PyDLL(None, use_errno=True)

# asm/unistd: x86-64 has numbers of its own, every other architecture takes the generic table's.
_X86 = platform.machine() in ("x86_64", "AMD64")
_PIVOT_ROOT = 155 if _X86 else 41
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_OPENAT2, _MOUNT_SETATTR = 437, 442
_AT_FDCWD = -100
EXIT_GROUP = 231 if _X86 else 94

# linux/sched.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
# linux/capability.h: _LINUX_CAPABILITY_VERSION_3 has 64 bits in two words of (effective, permitted, inheritable)
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
# linux/openat2.h
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8


def _checked(result: int, what: str = "") -> int:
    """Raises: OSError where the kernel refused."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def prctl(option: int, value: int = 0, third: int = 0) -> None:
    number = ctypes.c_ulong
    _checked(_libc.prctl(option, number(value), number(third), number(0), number(0)))


def signal_on_parents_death(signum: int) -> None:
    """Must come after every change of credentials, which takes it back."""
    prctl(_PR_SET_PDEATHSIG, signum)


def set_dumpable(dumpable: bool) -> None:
    prctl(_PR_SET_DUMPABLE, int(dumpable))


def set_subreaper(wanted: bool) -> None:
    """Whether the descendants whose parent ends become this process's children."""
    prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def set_no_new_privs() -> None:
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def limit_capabilities() -> None:
    """Empty the bounding and ambient sets, as far as the process may: none can be gained any more."""
    for capability in range(_LAST_CAPABILITY + 1):
        # Fails without CAP_SETPCAP, and above the last one that the kernel knows; no_new_privs does the same work.
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(_PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)


_CAPABILITY_HEAD = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()


def empty_capabilities() -> None:
    _checked(_libc.capset(_CAPABILITY_HEAD, _NO_CAPABILITIES))


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags))


def sethostname(name: str) -> None:
    raw = name.encode()
    _checked(_libc.sethostname(raw, len(raw)))


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    _checked(
        _libc.mount(_bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), _bytes(data)),
        f"{kind or source} on {target}",
    )


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    _checked(_libc.umount2(_bytes(target), flags), target)


def mount_setattr(target: str, flags: int, attributes: bytes) -> None:
    """``attributes``: a struct mount_attr."""
    size = ctypes.c_size_t(len(attributes))
    _checked(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, _bytes(target), flags, attributes, size), target)


def pivot_root(new: str, old: str) -> None:
    _checked(_libc.syscall(_PIVOT_ROOT, _bytes(new), _bytes(old)), new)


def open_beneath(folder: int, name: str) -> int:
    """Open for reading what ``name`` means below ``folder``, following no link and crossing no mount."""
    how = struct.pack(
        "QQQ",
        os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY,
        0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV,
    )
    return _checked(_libc.syscall(_OPENAT2, folder, _bytes(name), how, ctypes.c_size_t(len(how))), name)


def fork() -> int:
    """fork(2) without Python's own work in the child, which costs more than the rest of a short run: fresh locks and
    random numbers. For a process with one thread that holds none of its locks, and that draws its numbers itself."""
    return _checked(_with_gil.fork())


def raw_exit_group(code: int) -> int:
    """exit_group(2) without the C library around it, which would not stand the call's return: where a supervisor
    holds the system call and answers it, this returns what it answered."""
    return int(_libc.syscall(EXIT_GROUP, ctypes.c_long(code)))


# -- Landlock (Documentation/userspace-api/landlock.rst) ---------------------------------------------------------------

_FS_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read_file, read_dir
_FS_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # those that a rule on a file may hold
_FS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_SINCE, _NET_TCP = 4, 1 << 0 | 1 << 1
_SCOPE_SINCE, _SCOPES = 6, 1 << 0 | 1 << 1  # abstract unix sockets, signals


def landlock_abi() -> int:
    """The kernel's Landlock version.

    Raises:
        OSError: it has none, or it is switched off.
    """
    return _checked(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def landlock(readable: list[str], writable: list[str]) -> None:
    """Deny this process, and all below it, every file but what lies beneath these paths; TCP; and, where the kernel
    can, abstract unix sockets of and signals to whoever is outside."""
    abi = landlock_abi()
    handled = max(rights for since, rights in _FS_BY_ABI.items() if since <= abi)
    attributes = struct.pack(
        "QQQ", handled, _NET_TCP if abi >= _NET_SINCE else 0, _SCOPES if abi >= _SCOPE_SINCE else 0
    )
    size = 24 if abi >= _SCOPE_SINCE else 16 if abi >= _NET_SINCE else 8
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0))
    try:
        for paths, rights in ((readable, _FS_READ), (writable, handled)):
            for path in paths:
                _allow_beneath(ruleset, path, rights & handled)
        _checked(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow_beneath(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        allowed = rights if os.path.isdir(path) else rights & _FS_FILE
        rule = struct.pack("=Qi", allowed, handle)  # packed in the kernel's header too
        _checked(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), path)
    finally:
        os.close(handle)
