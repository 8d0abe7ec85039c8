"""Makes the ``*.bpf`` files beside it from the policy below; for maintainers, the result is kept in the repository.

    python -m retool.sandbox.filters.generate [--check]

Needs libseccomp 2.5 (``libseccomp.so.2``) on any machine: each variant is made for each architecture.

The policy is a list of what is allowed. What it does not name fails with ENOSYS, calls that are newer than it
included: the C library then takes its older way. What programs are known to probe fails with EPERM, for a message
that says what happened. Foreign architectures, x32 and ``int 0x80`` fail with EPERM whatever they call.

Comparisons see the lower 32 bits of an argument, as the kernel does for an int: else a caller could set the upper ones
and have the filter and the kernel see two different things. What a pointer points to cannot be seen at all; so clone3
fails, and in the variant ``restricted`` openat2.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from retool.sandbox.seccomp import NOTIFY_BASE, NOTIFY_SPAN, SELF_PID

MADE_WITH = (2, 5)
"""The version of libseccomp whose output is in the repository; another may order the instructions differently."""
VARIANTS = ("namespaced", "restricted")

# seccomp.h of libseccomp
_ACT_ALLOW = 0x7FFF0000
_ACT_NOTIFY = 0x7FC00000
_ACT_ERRNO = 0x00050000
_ATTR_ACT_BADARCH = 2
_ATTR_CTL_OPTIMIZE = 8
_CMP_GE = 5
_CMP_MASKED_EQ = 7
_API_LEVEL_WITH_NOTIFY = 5
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

ALLOW = _ACT_ALLOW
NOTIFY = _ACT_NOTIFY
EPERM = _ACT_ERRNO | errno.EPERM
ENOSYS = _ACT_ERRNO | errno.ENOSYS
WORD = 0xFFFFFFFF

_ALLOWED = """
    read write open close stat fstat lstat newfstatat statx poll ppoll select pselect6 lseek pread64 pwrite64 readv
    writev preadv pwritev preadv2 pwritev2 access faccessat faccessat2 pipe pipe2 dup dup2 dup3 sendfile flock fsync
    fdatasync sync_file_range ftruncate getdents getdents64 getcwd chdir fchdir rename renameat renameat2 mkdir mkdirat
    rmdir creat link linkat unlink unlinkat symlink symlinkat readlink readlinkat umask statfs fstatfs getxattr
    lgetxattr fgetxattr listxattr llistxattr flistxattr fallocate fadvise64 readahead copy_file_range splice tee
    close_range openat
    mmap mprotect munmap brk mremap msync mincore madvise mlock mlock2 munlock mlockall munlockall pkey_mprotect
    pkey_alloc pkey_free get_mempolicy membarrier
    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgid getpgrp getsid setpgid
    setsid setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capget capset wait4 waitid
    exit getrlimit setrlimit getrusage times sysinfo uname getpriority sched_yield sched_getparam sched_getscheduler
    sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_getaffinity getcpu
    ioprio_get arch_prctl set_tid_address set_robust_list get_robust_list rseq restart_syscall futex futex_waitv
    getrandom landlock_create_ruleset landlock_add_rule landlock_restrict_self
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause signalfd
    signalfd4
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time getitimer setitimer alarm timer_create
    timer_settime timer_gettime timer_getoverrun timer_delete timerfd_create timerfd_settime timerfd_gettime
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
    getsockname getpeername sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt
"""
"""In both variants, with any arguments. timer_create is bounded by RLIMIT_SIGPENDING. The setuid family and capset
cannot gain anything without capabilities; the trusted process that starts the runs has the same filter and needs them.
"""

_DENIED = """
    ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd process_madvise process_mrelease
    mount umount2 pivot_root chroot fsopen fsmount fsconfig fspick move_mount open_tree mount_setattr unshare setns
    init_module finit_module delete_module kexec_load kexec_file_load bpf perf_event_open userfaultfd seccomp
    io_uring_setup io_uring_enter io_uring_register io_setup io_destroy io_getevents io_pgetevents io_submit io_cancel
    keyctl add_key request_key open_by_handle_at name_to_handle_at quotactl quotactl_fd swapon swapoff reboot acct
    settimeofday adjtimex clock_settime clock_adjtime syslog sethostname setdomainname iopl ioperm modify_ldt
    vhangup nfsservctl lookup_dcookie memfd_create memfd_secret vmsplice execveat
    shmget shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    fanotify_init fanotify_mark inotify_init inotify_init1 inotify_add_watch inotify_rm_watch sync syncfs
    mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node ioprio_set sched_setscheduler sched_setparam
    sched_setattr
"""
"""In both variants, with any arguments. inotify's instances are counted for each user (128 by default), the trainer's
own included; sync and syncfs wait for other people's disks."""

_ALLOWED_NAMESPACED = """
    fork vfork execve kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal openat2
    connect bind listen accept accept4
    chmod fchmod fchmodat chown fchown lchown fchownat utime utimes utimensat futimesat truncate
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
"""
"""Refused in ``restricted``: new processes and signals to others, for there is no pid namespace; names in the file
system's attributes, for Landlock does not cover them."""
_WITHOUT_MESSAGE = frozenset({"openat2"})
"""Of those, what shall fail with ENOSYS, so that callers go on with openat."""

# sched.h
_CLONE_THREAD = 0x00010000
_CLONE_FORBIDDEN = (
    0x00020000  # NEWNS
    | 0x02000000  # NEWCGROUP
    | 0x04000000  # NEWUTS
    | 0x08000000  # NEWIPC
    | 0x10000000  # NEWUSER
    | 0x20000000  # NEWPID
    | 0x40000000  # NEWNET
    | 0x00008000  # PARENT: a child that its maker's parent would have to wait for
    | 0x00002000  # PTRACE
)
"""CLONE_NEWTIME is not among them: clone reads that bit as a part of the exit signal."""
# The same on both architectures: asm-generic/ioctls.h, and of linux/: fs.h, fsverity.h, fscrypt.h, userfaultfd.h
_IOCTLS = (
    0x5412,  # TIOCSTI: types into the terminal
    0x541C,  # TIOCLINUX
    0x541D,  # TIOCCONS
    0x5423,  # TIOCSETD: loads line disciplines
    0x40086602,  # FS_IOC_SETFLAGS; this and what follows change a file that is open for reading
    0x40046602,  # FS_IOC32_SETFLAGS
    0x401C5820,  # FS_IOC_FSSETXATTR
    0x40087602,  # FS_IOC_SETVERSION
    0x40806685,  # FS_IOC_ENABLE_VERITY
    0x800C6613,  # FS_IOC_SET_ENCRYPTION_POLICY
    0xAA00,  # USERFAULTFD_IOC_NEW
)
_IOCTLS_OWNER = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP: see _FCNTLS
_FCNTLS = (
    8,  # F_SETOWN: with the two below, sends any signal to any process of the user
    15,  # F_SETOWN_EX
    10,  # F_SETSIG
    1024,  # F_SETLEASE: others wait up to 45 s to open the file
)
_PRCTLS = (22, 35, 59, 62)  # PR_SET_SECCOMP, PR_SET_MM, PR_SET_SYSCALL_USER_DISPATCH, PR_SCHED_CORE
_SOCKET_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
_SOL_SOCKET = 1
_AF_UNIX = 1
_SOCK_TYPE_MASK = 0xF
_SOCK_CONNECTED = (1, 5)  # SOCK_STREAM, SOCK_SEQPACKET
_S_IFMT = 0o170000
_PLAIN_FILES = (0, 0o100000, 0o010000, 0o140000)  # regular twice, FIFO, socket
_O_ACCMODE = 3
_O_TRUNC = 0o1000


class Test(NamedTuple):
    """Holds where the argument's lower word under ``mask`` equals ``value``."""

    arg: int
    value: int
    mask: int = WORD


class Rule(NamedTuple):
    action: int
    tests: tuple[Test, ...]


class Call(NamedTuple):
    """What one system call gets: the action of the rule whose tests all hold, else ``otherwise``."""

    otherwise: int
    rules: tuple[Rule, ...] = ()


def _one_of(action: int, arg: int, values: tuple[int, ...], mask: int = WORD) -> tuple[Rule, ...]:
    return tuple(Rule(action, (Test(arg, value, mask),)) for value in values)


def _common(own_pids: tuple[int, ...]) -> dict[str, Call]:
    """What needs a look at the arguments in both variants."""
    span = WORD & ~(NOTIFY_SPAN - 1)
    filters = tuple(Rule(EPERM, (Test(1, _SOL_SOCKET), Test(2, option))) for option in _SOCKET_FILTERS)
    return {
        "exit_group": Call(ALLOW, _one_of(NOTIFY, 0, (NOTIFY_BASE,), span)),
        "prctl": Call(ALLOW, _one_of(EPERM, 0, _PRCTLS)),
        "personality": Call(EPERM, _one_of(ALLOW, 0, (0, WORD))),  # WORD only asks
        "mknod": Call(EPERM, _one_of(ALLOW, 1, _PLAIN_FILES, _S_IFMT)),
        "mknodat": Call(EPERM, _one_of(ALLOW, 2, _PLAIN_FILES, _S_IFMT)),
        "setpriority": Call(EPERM, (Rule(ALLOW, (Test(0, 0), Test(1, 0))),)),  # PRIO_PROCESS, itself
        "sched_setaffinity": Call(EPERM, _one_of(ALLOW, 0, own_pids)),
        "prlimit64": Call(EPERM, _one_of(ALLOW, 0, own_pids)),
        "setsockopt": Call(ALLOW, filters),
    }


def _namespaced() -> dict[str, Call]:
    return {
        **{name: Call(ALLOW) for name in _ALLOWED_NAMESPACED.split()},
        **_common((0,)),
        "clone": Call(EPERM, _one_of(ALLOW, 0, (0,), _CLONE_FORBIDDEN)),
        "socket": Call(EPERM, _one_of(ALLOW, 0, (_AF_UNIX,))),
        "socketpair": Call(EPERM, _one_of(ALLOW, 0, (_AF_UNIX,))),
        "ioctl": Call(ALLOW, _one_of(EPERM, 1, _IOCTLS)),
        "fcntl": Call(ALLOW),
    }


def _restricted() -> dict[str, Call]:
    own_pids = (0, SELF_PID)
    # A datagram socket of a pair can still send to any other that has a name.
    pairs = tuple(Rule(ALLOW, (Test(0, _AF_UNIX), Test(1, kind, _SOCK_TYPE_MASK))) for kind in _SOCK_CONNECTED)

    def opening(flags: int) -> Call:
        # Landlock asks for what the descriptor may do. O_RDONLY | O_TRUNC truncates all the same, and access mode 3
        # gives a descriptor that may do nothing.
        reading = Rule(EPERM, (Test(flags, _O_TRUNC, _O_TRUNC | _O_ACCMODE),))
        nothing = Rule(EPERM, (Test(flags, _O_ACCMODE, _O_ACCMODE),))
        return Call(ALLOW, (reading, nothing))

    return {
        **{name: Call(EPERM) for name in _ALLOWED_NAMESPACED.split() if name not in _WITHOUT_MESSAGE},
        **_common(own_pids),
        "clone": Call(EPERM, _one_of(ALLOW, 0, (_CLONE_THREAD,), _CLONE_FORBIDDEN | _CLONE_THREAD)),
        "kill": Call(EPERM, _one_of(ALLOW, 0, own_pids)),
        "tgkill": Call(EPERM, _one_of(ALLOW, 0, (SELF_PID,))),
        "socket": Call(EPERM),
        "socketpair": Call(EPERM, pairs),
        "ioctl": Call(ALLOW, _one_of(EPERM, 1, _IOCTLS + _IOCTLS_OWNER)),
        "fcntl": Call(ALLOW, _one_of(EPERM, 1, _FCNTLS)),
        "open": opening(1),
        "openat": opening(2),
    }


def policy(variant: str) -> dict[str, Call]:
    """Every system call that the variant names; all others fail with ENOSYS."""
    special = _namespaced() if variant == "namespaced" else _restricted()
    calls = {name: Call(EPERM) for name in _DENIED.split()}
    calls.update((name, Call(ALLOW)) for name in _ALLOWED.split())
    return {**calls, **special}


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


class Libseccomp:
    """The few of its functions that are needed.

    Raises: OSError where it is not installed."""

    def __init__(self) -> None:
        lib = self._lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        context, word = ctypes.c_void_p, ctypes.c_uint32
        lib.seccomp_version.restype = ctypes.POINTER(_Version)
        lib.seccomp_init.restype, lib.seccomp_init.argtypes = context, (word,)
        lib.seccomp_release.restype, lib.seccomp_release.argtypes = None, (context,)
        lib.seccomp_arch_native.restype = word
        lib.seccomp_arch_add.argtypes = lib.seccomp_arch_remove.argtypes = (context, word)
        lib.seccomp_attr_set.argtypes = (context, ctypes.c_int, word)
        lib.seccomp_rule_add_array.argtypes = (context, word, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
        lib.seccomp_export_bpf.argtypes = (context, ctypes.c_int)

    def version(self) -> tuple[int, int]:
        found = self._lib.seccomp_version().contents
        return found.major, found.minor

    def compile(self, calls: dict[str, Call], architecture: int) -> bytes:
        """The program as the kernel takes it. Raises: RuntimeError where the library refuses."""
        lib = self._lib
        # Else a kernel without notifications would keep them out of the filter.
        self._check(lib.seccomp_api_set(_API_LEVEL_WITH_NOTIFY), "api")
        context = lib.seccomp_init(ENOSYS)
        try:
            if lib.seccomp_arch_native() != architecture:
                self._check(lib.seccomp_arch_add(context, architecture), "architecture")
                self._check(lib.seccomp_arch_remove(context, lib.seccomp_arch_native()), "architecture")
            self._check(lib.seccomp_attr_set(context, _ATTR_ACT_BADARCH, EPERM), "bad architecture")
            self._check(lib.seccomp_attr_set(context, _ATTR_CTL_OPTIMIZE, 2), "binary tree")
            for name in sorted(calls):
                self._add(context, name, calls[name])
            with tempfile.TemporaryFile() as file:
                self._check(lib.seccomp_export_bpf(context, file.fileno()), "export")
                file.seek(0)
                return file.read()
        finally:
            lib.seccomp_release(context)

    def _add(self, context: int, name: str, call: Call) -> None:
        number = self._lib.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            raise RuntimeError(f"libseccomp does not know the system call {name}")
        for rule in call.rules:
            compared = [_Comparison(test.arg, _CMP_MASKED_EQ, test.mask, test.value) for test in rule.tests]
            self._rule(context, name, number, rule.action, compared)
        # Rules of one call have no order of their own. The library puts comparisons of higher arguments first and
        # those under a mask before GE, so this one, which always holds, is asked last. The tests hold it to that.
        always = [_Comparison(0, _CMP_GE, 0, 0)] if call.rules else []
        self._rule(context, name, number, call.otherwise, always)

    def _rule(self, context: int, name: str, number: int, action: int, compared: list[_Comparison]) -> None:
        if action == ENOSYS:
            return  # the library refuses a rule that does what happens anyway
        array = (_Comparison * max(1, len(compared)))(*compared)
        self._check(self._lib.seccomp_rule_add_array(context, action, number, len(compared), array), name)

    @staticmethod
    def _check(result: int, what: str) -> None:
        if result < 0:
            raise RuntimeError(f"libseccomp refuses {what}: {os.strerror(-result)}")


def build(library: Libseccomp) -> dict[str, bytes]:
    """Every program by its file's name."""
    return {
        f"{variant}.{machine}.bpf": library.compile(policy(variant), architecture)
        for variant in VARIANTS
        for machine, architecture in ARCHITECTURES.items()
    }


def main(arguments: list[str]) -> int:
    library = Libseccomp()
    if library.version() != MADE_WITH:
        print(f"note: libseccomp {library.version()}, not {MADE_WITH}: expect differences", file=sys.stderr)
    folder = Path(__file__).resolve().parent
    different = 0
    for name, program in build(library).items():
        path = folder / name
        if path.exists() and path.read_bytes() == program:
            continue
        different += 1
        if "--check" in arguments:
            print(f"{name} is not what the policy gives", file=sys.stderr)
        else:
            path.write_bytes(program)
            print(f"{name}: {len(program) // 8} instructions")
    return 1 if different and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
