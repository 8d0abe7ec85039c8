"""Cases about other processes, files, the network and the sandbox's own workings."""

from __future__ import annotations

from cases import Case, Ends

DENIED = "EPERM|EACCES"
_FORK = Ends("fork fails with EPERM", "error", 1, err="PermissionError")
_READ = "def read(path):\n    with open(path, 'rb') as file: return file.read()\n"

CASES = [
    Case(8, "descriptors 0–255 closed", "import os; os.closerange(0, 256)", Ends("`ok`", exit_code=0, whole="")),
    Case(
        8,
        "closed, then exits",
        "import os; os.closerange(0, 256); os._exit(7)",
        Ends("its code", "error", 7),
    ),
    Case(
        9,
        "kill(ppid), kill(−1)",
        "print(tried(os.kill, os.getppid(), 9), tried(os.kill, -1, 9), 'alive')",
        Ends("nobody else's harm", exit_code=0, out="(done|EPERM) (done|ESRCH|EPERM) alive"),
        restricted=Ends("EPERM", out="EPERM EPERM alive"),
    ),
    Case(
        9,
        "every signal to pid 1",
        "found = set()\nfor number in range(1, 65):\n    found.add(tried(os.kill, 1, number))\n"
        "    found.add(tried(os.kill, os.getppid(), number))\nprint(*sorted(found))",
        Ends("EPERM", out="EPERM"),
        userns=Ends("taken, without effect", out="done|EPERM"),
    ),
    Case(
        9,
        "signals by pidfd, F_SETOWN, sigqueue",
        "import fcntl, signal\nprint(call('pidfd_open', os.getppid(), 0), end=' ')\n"
        "try:\n    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9); print('done')\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        Ends("EPERM", out="done EPERM"),
        userns=Ends("taken, without effect", out="done (done|EPERM)"),
        restricted=Ends("EPERM", out="EPERM EPERM"),
    ),
    Case(
        11,
        "ptrace, process_vm_readv",
        "print(call('ptrace', 16, os.getppid(), 0, 0), call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0))",
        Ends("EPERM", out="EPERM EPERM"),
    ),
    Case(
        12,
        "`/etc/passwd`, `~/.ssh`",
        _READ
        + "for path in ('/etc/passwd', '/root/.ssh/id_rsa', '/etc/shadow', '/etc/hostname', '/var/lib/dpkg/status', "
        "'$REPOSITORY'):\n"
        "    print(tried(read, path), end=' ')",
        Ends("absent", out="ENOENT ENOENT ENOENT ENOENT ENOENT (ENOENT|EISDIR)"),
        restricted=Ends("EACCES", out="(EACCES ?|ENOENT ?)+"),
    ),
    Case(
        13,
        "secrets of the environment",
        _READ + "import glob, os\ntexts = [repr(dict(os.environ)).encode()]\n"
        "for path in ['/proc/self/environ', *glob.glob('/proc/[0-9]*/environ')]:\n"
        "    try: texts.append(read(path))\n    except OSError: pass\n"
        "print(b'$SECRET' in b''.join(texts))",
        Ends("none", out="False"),
    ),
    Case(
        14,
        "`/proc/1/environ`, `/proc/1/mem`",
        _READ + "print(tried(read, '/proc/1/environ'), tried(read, '/proc/1/mem'), "
        "tried(read, f'/proc/{os.getppid()}/environ'), tried(os.listdir, '/proc/1/fd'))",
        Ends("its own init, and EACCES", out="((EACCES|ENOENT|EPERM) ?){4}"),
    ),
    Case(
        15,
        "TCP, UDP, DNS out",
        "import socket\nprint(tried(socket.socket), tried(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM), "
        "tried(socket.getaddrinfo, 'example.org', 80))",
        Ends("fails at once", out=r"EPERM EPERM (gaierror|\S+)"),
        timeout_s=5,
    ),
    Case(
        16,
        "loopback to a listener outside",
        "import socket\nprint(tried(socket.create_connection, ('127.0.0.1', $PORT), 2), "
        "tried(socket.create_connection, ('localhost', $PORT), 2))",
        Ends("refused", out=r"EPERM \S+"),
        timeout_s=5,
    ),
    Case(
        17,
        "unix sockets outside, abstract and named",
        "import socket\nfor name in ('\\0$ABSTRACT', '$NAMED'):\n    try:\n"
        "        socket.socket(socket.AF_UNIX).connect(name); print('done')\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\nlibc.getpid();",
        Ends("refused", out="ECONNREFUSED\n(ENOENT|ECONNREFUSED)\n.*"),
        restricted=Ends("EPERM", out="EPERM\nEPERM\n.*"),
    ),
    Case(
        44,
        "site-packages, standard library, interpreter written to",
        "import random, site, sysconfig\nfound = set()\n"
        "for path in (sysconfig.get_path('purelib') + '/x', random.__file__, sys.executable, '/usr/lib/x', '/x'):\n"
        "    found |= {tried(open, path, 'w'), tried(os.unlink, path), tried(os.mkdir, path + '.d')}\n"
        "print(*sorted(found))",
        Ends("read-only", out="((EROFS|EACCES|ENOENT|ETXTBSY|EPERM) ?)+"),
    ),
    Case(
        47,
        "SysV and POSIX shared memory",
        "from multiprocessing import resource_tracker, shared_memory\nprint(call('shmget', 0, 4096, 0o1666), "
        "call('msgget', 0, 0o1666), call('semget', 0, 1, 0o1666), call('mq_open', b'/q', 0o102, 0o600, 0))\n"
        "resource_tracker.register = lambda *a: None\nx = shared_memory.SharedMemory('left', True, 4096)\n"
        "print(os.path.exists('/dev/shm/left'))",
        Ends("EPERM; gone after the run", out="EPERM EPERM EPERM EPERM\nTrue"),
        restricted=Ends("EPERM, EACCES", "error", 1, out="EPERM EPERM EPERM EPERM", err="PermissionError"),
    ),
    Case(
        48,
        "forged answers",
        "import os, sys\nfor fd in range(3, 1024):\n    try: os.write(fd, b'\\x03' * 100)\n    except OSError: pass\n"
        'print(\'{"status": "ok"}\')\nsys.exit(3)',
        Ends("only its own output", "error", 3, out=".*ok.*"),
    ),
    Case(
        64,
        "a forged exit notification",
        "import os\nprint('a', flush=True)\nos._exit(0x52540000)",
        Ends("its own exit code", exit_code=0, out="a"),
    ),
    Case(
        64,
        "the same for a session's cell",
        "import os\nos._exit(0x52540100 + 9)",
        Ends("its own exit code", "error", 9),
    ),
    Case(
        64,
        "the same from a grandchild",
        "import os, time\nif os.fork() == 0: os._exit(0x52540007)\ntime.sleep(5)\nprint('late')",
        Ends("ends its own run", "error", 7, whole=""),
        restricted=_FORK,
    ),
    Case(
        64,
        "the same from thirty at once",
        "import os, time\nfor n in range(30):\n    if os.fork() == 0: os._exit(0x52540100 | n)\ntime.sleep(5)",
        Ends("ends its own run", "ok|error", whole=""),
        restricted=_FORK,
    ),
    Case(
        64,
        "the same from a thread, in a loop",
        "import threading, time\ndef forge():\n"
        "    while True: libc.syscall(ctypes.c_long(231), ctypes.c_long(0x52540105))\n"
        "for _ in range(4): threading.Thread(target=forge, daemon=True).start()\ntime.sleep(5)",
        Ends("ends its own run", "ok|error", whole=""),
        only="x86_64",
    ),
    Case(
        65,
        "writes after its answer",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "    while True:\n        try: os.write(1, b'late')\n        except OSError: pass\nprint('done'); os._exit(0)",
        Ends("dead before it can", "ok", out="(late)*done.*"),
        restricted=_FORK,
    ),
    Case(
        66,
        "its code's pipe read again",
        "print(tried(os.read, 3, 10), tried(os.fstat, 4))",
        Ends("EBADF", out="EBADF EBADF"),
    ),
    Case(
        67,
        "`/proc/sys`, `/proc/1` written to",
        "found = set()\nfor path in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/overcommit_memory', "
        "'/proc/sysrq-trigger', '/proc/1/oom_score_adj', '/proc/1/mem', f'/proc/{os.getppid()}/oom_score_adj', "
        "'/proc/1/uid_map'):\n    found.add(tried(open, path, 'r+'))\nprint(*sorted(found))",
        Ends("refused", out="((EROFS|EACCES|ENOENT|EPERM) ?)+"),
    ),
    Case(
        68,
        "oom_score_adj lowered",
        "def lower():\n    with open('/proc/self/oom_score_adj', 'w') as file: file.write('-1000')\n"
        "print(tried(lower))",
        Ends("EROFS", out="EROFS|EACCES"),
        restricted=Ends("EACCES", out="EACCES"),
    ),
    Case(
        69,
        "priorities of others",
        "print(tried(os.setpriority, 0, os.getppid(), 5), tried(os.sched_setaffinity, os.getppid(), {0}), "
        "tried(os.sched_setscheduler, 0, 1, os.sched_param(1)), tried(os.setpriority, 0, 0, -5), "
        "tried(os.setpriority, 2, 0, 5))",
        Ends("EPERM", out="(EPERM|EACCES|ESRCH)( (EPERM|EACCES|ESRCH)){4}"),
    ),
    Case(
        70,
        "working folder: chmod, attributes, a new name",
        "os.chmod('.', 0o700) if os.stat('.').st_uid == os.getuid() else 0\n"
        "print(tried(os.setxattr, '.', 'user.x', b'1'), tried(os.rename, os.getcwd(), os.getcwd() + 'x'))",
        Ends("refused, it is not its own", out="(EPERM|EACCES) (EPERM|EACCES|EROFS|EBUSY)"),
        userns=Ends("mended before the next run", out=r"\S+ \S+"),
        restricted=Ends("refused", "ok|error"),
    ),
    Case(
        71,
        "left: files, links, deep and locked folders",
        "def make(path='.'):\n    for n in range(20): open(f'f{n}', 'w').write('x')\n    os.link('f0', 'hard')\n"
        "    os.symlink('/', 'soft')\n    os.mkfifo('fifo')\n    os.makedirs('l/m')\n    open('l/m/n', 'w')\n"
        "make()\ntried(os.chmod, 'l/m', 0)\ntried(os.chmod, 'l', 0)\n"
        "for _ in range(200): os.mkdir('d' * 50); os.chdir('d' * 50)\nprint('made')",
        Ends("gone", out="made"),
    ),
    Case(
        71,
        "left: sticky bits, odd names, attributes, a file held by a mapping",
        "import mmap\nfor name in (b'\\xff\\xfe', b'a\\nb', b' ', b'-rf', b'*'): open(name, 'w')\n"
        "f = open('m', 'wb+'); f.truncate(1 << 20); m = mmap.mmap(f.fileno(), 1 << 20); m[:] = b'x' * (1 << 20)\n"
        "os.unlink('m')\ntried(os.setxattr, b'a\\nb', 'user.x', b'1')\nprint('made')",
        Ends("gone", out="made"),
    ),
    Case(
        71,
        "left: immutable files",
        "import array, fcntl\nf = open('a', 'w')\nprint(tried(fcntl.ioctl, f, 0x40086602, array.array('l', [0x10])))",
        Ends("EPERM", out="EPERM"),
    ),
    Case(
        72,
        "sockets that hold each other and files",
        "import os, socket\nfor n in range(40):\n    a, b = socket.socketpair()\n"
        "    f = open('x', 'wb'); f.write(bytes(1 << 16))\n"
        "    os.unlink('x')\n    socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), f.fileno()])\n"
        "    socket.send_fds(b, [b'x'], [a.fileno(), b.fileno()])\nprint('made')",
        Ends("freed before the next run", out="made"),
    ),
    Case(
        73,
        "setuid programs",
        "found = []\nfor place, _, names in os.walk('/usr'):\n    for name in names:\n        try:\n"
        "            mode = os.lstat(os.path.join(place, name)).st_mode\n"
        "            if mode & 0o6000 and mode & 0o170000 == 0o100000: found.append(name)\n"
        "        except OSError: pass\nprint(tried(os.execv, '/usr/bin/passwd', ['x']), tried(os.execv, '/bin/su', "
        "['x']))",
        Ends("absent", out="ENOENT ENOENT"),
        restricted=Ends("no exec at all", out="EPERM EPERM"),
    ),
    Case(
        74,
        "devices",
        "import stat\nprint(tried(os.mknod, 'x', stat.S_IFCHR | 0o600, os.makedev(1, 1)), "
        "tried(os.mknod, 'y', stat.S_IFBLK | 0o600, os.makedev(8, 0)), tried(open, '/dev/mem'), tried(open, "
        "'/dev/kmsg'))",
        Ends("EPERM; absent", out="EPERM EPERM ENOENT ENOENT"),
        restricted=Ends("EPERM, EACCES", out="EPERM EPERM (EACCES|ENOENT|EPERM) (EACCES|ENOENT|EPERM)"),
    ),
    Case(
        75,
        "what is mounted, what lies at the root",
        "import os\nprint(*sorted(os.listdir('/')))",
        Ends("interpreter and libraries", out=r"[\w .-]+", exit_code=0),
        restricted=Ends("EACCES", "error", 1, err="PermissionError"),
    ),
]
