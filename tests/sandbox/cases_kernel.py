"""Cases about system calls."""

from __future__ import annotations

from cases import Case, Ends

_REFUSED = "((EPERM|ENOSYS) ?)+"
_MACHINE_CODE = (
    "import mmap\ndef run(code):\n    page = mmap.mmap(-1, 4096, prot=7)\n    page.write(code)\n"
    "    address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
    "    return ctypes.CFUNCTYPE(ctypes.c_long)(address)()\n"
)

CASES = [
    Case(
        45,
        "mount, unshare, clone3, init_module, bpf, io_uring, keyctl",
        "for name in ('mount', 'umount2', 'pivot_root', 'setns', 'init_module', 'bpf', 'io_uring_setup', 'io_setup', "
        "'keyctl', 'clone3'):\n    print(call(name, 0, 0, 0, 0, 0), end=' ')\n"
        "for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000): print(call('unshare', flag), end=' ')",
        Ends("EPERM or ENOSYS", out=_REFUSED),
    ),
    Case(
        46,
        "x32 calls",
        "print(call(0x40000000 | 39), call(0x40000000 | 1, 1, b'x', 1))",
        Ends("EPERM", out="EPERM EPERM"),
        only="x86_64",
    ),
    Case(
        46,
        "`int 80h`",
        # mov eax, 20 (getpid of i386); int 80h; movsxd rax, eax; ret
        _MACHINE_CODE + "print(run(bytes.fromhex('b814000000cd804863c0c3')))\nlibc.getpid();",
        Ends("EPERM", out="-1\n.*"),
        only="x86_64",
    ),
    Case(
        76,
        "perf_event_open, userfaultfd",
        "print(call('perf_event_open', 0, 0, -1, -1, 0), call('userfaultfd', 1))",
        Ends("EPERM", out="EPERM EPERM"),
    ),
    Case(77, "memfd_create", "print(call('memfd_create', b'x', 0))", Ends("EPERM", out="EPERM")),
    Case(
        78,
        "AF_NETLINK, AF_ALG, AF_VSOCK, AF_PACKET, AF_INET raw",
        "import socket\nfor family, kind in ((16, 3), (38, 5), (40, 1), (17, 3), (2, 3), (2, 1), (10, 1)):\n"
        "    print(tried(socket.socket, family, kind), end=' ')",
        Ends("EPERM", out="(EPERM ?)+"),
    ),
    Case(
        79,
        "inotify, fanotify",
        "print(call('inotify_init1', 0), call('fanotify_init', 0, 0))",
        Ends("EPERM", out="EPERM EPERM"),
    ),
    Case(
        80,
        "open_by_handle_at",
        "print(call('open_by_handle_at', -100, b'\\x08\\0\\0\\0\\x01\\0\\0\\0' + b'\\2' * 8, 0))",
        Ends("EPERM", out="EPERM"),
    ),
    Case(
        81,
        "a user namespace by clone",
        "for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):\n"
        "    print(call('clone', flag | 17, 0, 0, 0, 0), end=' ')",
        Ends("EPERM", out="(EPERM ?)+"),
    ),
    Case(
        82,
        "TIOCSTI, other ioctls",
        "import fcntl\nprint(tried(fcntl.ioctl, 0, 0x5412, b'x'), tried(fcntl.ioctl, 1, 0x5423, b'x' * 4))",
        Ends("EPERM", out="EPERM EPERM"),
    ),
    Case(
        83,
        "prctl games",
        "for option, value in ((22, 1), (35, 1), (59, 1), (62, 1)):\n"
        "    print(libc.prctl(option, value, 0, 0, 0), end=' ')\n"
        "for option, value in ((1, 0), (4, 0), (36, 1), (4, 1), (8, 1)): libc.prctl(option, value, 0, 0, 0)\n"
        "print(libc.prctl(39, 0, 0, 0, 0))",
        Ends("refused or harmless", out="-1 -1 -1 -1 1"),
    ),
    Case(
        84,
        "capabilities, other users",
        "print(tried(os.setuid, 0) if os.getuid() else 'EPERM', tried(os.chown, '.', 1, 1), tried(os.chroot, '.'), "
        "[line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')])",
        Ends("none", out=r"EPERM (EPERM|EINVAL) EPERM \['0{16}', '0{16}', '0{16}', '0{16}', '0{16}'\]"),
        userns=Ends("none", out=r"EPERM (EPERM|EINVAL) EPERM \['0{16}', '0{16}', '0{16}', '0{16}', '0{16}'\]"),
        restricted=Ends("none", "ok|error", err="|PermissionError"),
    ),
    Case(
        85,
        "personality: no address randomisation, 32 bits",
        "print(libc.personality(0x0040000), libc.personality(8))",
        Ends("EPERM", out="-1 -1"),
    ),
    Case(
        86,
        "pidfd_getfd",
        "print(call('pidfd_getfd', 0, 0, 0))",
        Ends("EPERM", out="EPERM"),
    ),
]
