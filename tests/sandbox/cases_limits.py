"""Cases about time, memory, disk, output and the number of things."""

from __future__ import annotations

from cases import ANY, Case, Ends, not_promised

KIB = 1024
TIMEOUT = Ends("`timeout`", "timeout", None)
MEMORY = Ends("`MemoryError`, `memory`", "memory", 1)
SHORT = 0.4
_COUNT = "import sys\nfor i in range({}): print(i, file=sys.{})"
_PREFIX = "".join(f"{i}\n" for i in range(3000))[: 8 * KIB]
_OUTPUT = "the exact prefix, `output_limit`"

CASES = [
    Case(
        1,
        "fork bomb",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        Ends("forks refused, `timeout`", "timeout", None),
        timeout_s=SHORT,
    ),
    Case(
        1,
        "how many processes",
        "n = 0\ntry:\n    while n < 200:\n        if os.fork() == 0: time.sleep(100)\n        n += 1\n"
        "except OSError as error: print(errno.errorcode[error.errno], n <= 16)\nlibc.getpid();",
        Ends("EAGAIN at `processes`", out="EAGAIN True\n.*"),
        restricted=Ends("EPERM", out="EPERM True\n.*"),
        config={"processes": 16},
    ),
    Case(
        2,
        "memory bomb",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        MEMORY,
        config={"memory_mb": 96},
    ),
    Case(
        2,
        "memory bomb in ten processes",
        "import os\nfor _ in range(10):\n    if os.fork() == 0:\n        try:\n            x = b'x' * (60 << 20)\n"
        "            os._exit(3)\n        except MemoryError: os._exit(4)\n"
        "print(any(os.WIFSIGNALED(os.wait()[1]) for _ in range(10)))",
        Ends("the kernel kills within the control group", "ok|memory|killed", out="True|"),
        userns=not_promised("memory is bounded for each process"),
        restricted=not_promised("one process a run"),
        config={"memory_mb": 96},
    ),
    Case(
        3,
        "`/tmp` filled",
        "def fill():\n    n = 0\n    while True:\n        n += 1\n        open(str(n), 'wb').write(bytes(1 << 20))\n"
        "print(tried(fill))",
        Ends("ENOSPC", out="ENOSPC"),
        restricted=not_promised("the disk is bounded for each file"),
        config={"file_mb": 4},
    ),
    Case(
        3,
        "one endless file",
        "def fill():\n    f = open('a', 'wb')\n    while True: f.write(bytes(1 << 20))\nprint(tried(fill))",
        Ends("ENOSPC", out="ENOSPC"),
        restricted=Ends("EFBIG", out="EFBIG"),
        config={"file_mb": 4},
    ),
    Case(
        4,
        "inodes filled",
        "def fill():\n    n = 0\n    while True:\n        n += 1\n        open(str(n), 'w')\nprint(tried(fill))",
        Ends("ENOSPC", out="ENOSPC"),
        restricted=not_promised("files are not counted"),
        config={"max_files": 64},
    ),
    Case(
        5,
        "endless stdout",
        "while True: print('x')",
        Ends(_OUTPUT, "output_limit", None, whole="x\n" * 512, truncated=True),
        config={"output_kb": 1},
    ),
    Case(
        6,
        "5 MB of stdout",
        _COUNT.format(700_000, "stdout"),
        Ends(_OUTPUT, "output_limit", None, whole=_PREFIX, truncated=True),
        config={"output_kb": 8},
    ),
    Case(
        7,
        "5 MB of stderr",
        _COUNT.format(700_000, "stderr"),
        Ends(_OUTPUT, "output_limit", None, whole_err=_PREFIX, truncated=True),
        config={"output_kb": 8},
    ),
    Case(
        7,
        "50 MB without a line's end",
        "import sys; sys.stdout.write('x' * 50_000_000)",
        Ends(_OUTPUT, "output_limit", None, whole="x" * 8 * KIB, truncated=True),
        config={"output_kb": 8},
    ),
    Case(
        22,
        "daemon past the deadline",
        "import os, time\nif os.fork(): print('a', flush=True)\nelse: os.setsid()\nwhile True: time.sleep(1)",
        Ends("dead, `timeout`", "timeout", None, out="a"),
        restricted=Ends("fork fails with EPERM", "error", 1, err="PermissionError"),
        timeout_s=SHORT,
    ),
    Case(
        23,
        "double fork, setsid",
        "import os, time\nif os.fork():\n    os.wait()\n    print('done')\nelse:\n    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n    os.setsid()\n    time.sleep(1000)",
        Ends("dead at the end, `ok`", out="done"),
        restricted=Ends("fork fails with EPERM", "error", 1, err="PermissionError"),
    ),
    Case(
        24,
        "a grandchild that holds stdout",
        "import os, time\nif os.fork(): print('done')\nelse: time.sleep(1000)",
        Ends("answered at once, killed", out="done"),
        restricted=Ends("fork fails with EPERM", "error", 1, err="PermissionError"),
    ),
    Case(
        25,
        "every signal ignored",
        "import signal, time\nfor s in signal.valid_signals() - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(1000)",
        TIMEOUT,
        timeout_s=SHORT,
    ),
    Case(26, "SIGSTOP to itself", "import os; os.kill(os.getpid(), 19)", TIMEOUT, timeout_s=SHORT),
    Case(34, "hanging atexit", "import atexit, time; atexit.register(time.sleep, 1000)", TIMEOUT, timeout_s=SHORT),
    Case(
        35,
        "non-daemon thread",
        "import threading as t, time\nt.Thread(target=lambda: (time.sleep(.05), print('t'))).start()",
        Ends("waited for", exit_code=0, out="t"),
    ),
    Case(
        35,
        "endless thread",
        "import threading as t, time\nt.Thread(target=time.sleep, args=(1000,)).start()",
        TIMEOUT,
        timeout_s=SHORT,
    ),
    Case(
        40,
        "a thousand zombies",
        "import os\nmade = 0\nwhile made < 1000:\n    try:\n        pid = os.fork()\n"
        "    except BlockingIOError: continue\n"
        "    if pid == 0:\n        try: os.fork()\n        except OSError: pass\n        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n    made += 1\nprint(made)",
        Ends("reaped", exit_code=0, out="1000"),
        restricted=Ends("fork fails with EPERM", "error", 1, err="PermissionError"),
    ),
    Case(
        53,
        "`/dev/shm` as memory",
        "def fill():\n    f = open('/dev/shm/a', 'wb')\n    while True: f.write(bytes(1 << 20))\nprint(tried(fill))",
        Ends("ENOSPC: the same bounded disk", out="ENOSPC"),
        restricted=Ends("EACCES", out="EACCES"),
        config={"file_mb": 4},
    ),
    Case(
        54,
        "thread bomb",
        "import threading, time\nn = 0\ntry:\n    while n < 5000:\n"
        "        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n        n += 1\n"
        "except RuntimeError as error: print(error)",
        Ends("no more than `processes`", exit_code=0, out="can't start new thread"),
        restricted=Ends(
            "bounded by `memory_mb`, as user also by `processes`", exit_code=0, out="can't start new thread"
        ),
        config={"memory_mb": 256},
    ),
    Case(
        55,
        "timers and timerfds without end",
        "def flood(): \n    timer = ctypes.c_int()\n    for _ in range(100000):\n"
        "        found = call('timer_create', 1, 0, ctypes.byref(timer))\n        if found != 'done': return found\n"
        "def descriptors():\n    while True: os.dup(0)\nprint(flood(), tried(descriptors))",
        Ends("EAGAIN, EMFILE", out="EAGAIN EMFILE"),
    ),
    Case(
        56,
        "raises its own limits",
        "import resource as r\nfor limit in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE, r.RLIMIT_CPU, "
        "r.RLIMIT_CORE):\n"
        "    print(tried(r.setrlimit, limit, (-1, -1)), end=' ')\nlibc.getpid();",
        Ends("refused", out="(ValueError ){5}.*"),
    ),
    Case(
        57,
        "limits of a new program",
        "import subprocess, sys\nask = 'import resource as r; print(r.getrlimit(r.RLIMIT_AS), "
        "r.getrlimit(r.RLIMIT_CORE))'\n"
        "print(subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True).stdout)",
        Ends("the same", out=r"\((?!-1)\d+, \d+\) \(0, 0\)"),
        restricted=Ends("EPERM", "error", 1, err="PermissionError"),
    ),
    Case(
        58,
        "C++-like abort, SIGBUS, alarm, SIGXCPU",
        "import mmap\nf = open('a', 'wb+')\nf.truncate(4096)\nm = mmap.mmap(f.fileno(), 4096)\nf.truncate(0)\nm[0]",
        Ends("`killed`, −7", "killed", -7),
    ),
    Case(58, "alarm", "import signal, time; signal.alarm(1); time.sleep(10)", Ends("`killed`, −14", "killed", -14)),
    Case(
        59,
        "core dump",
        "import os; os.abort()",
        Ends("`killed`, −6, no file", "killed", -6, not_fetched={"core": "No such file"}),
        request={"fetch": ["core"]},
    ),
    Case(
        60,
        "CPU time of each process",
        "while True: pass",
        Ends("`timeout`, by the kernel", "timeout", None),
        timeout_s=20,
        request={"cpu_s": 1},
    ),
    Case(61, "shared memory", "import mmap\nx = [mmap.mmap(-1, 1 << 20) for _ in range(10**4)]", MEMORY),
    Case(
        62,
        "huge argument list",
        "import subprocess, sys\nprint(tried(subprocess.run, [sys.executable, 'x' * (1 << 22)]))",
        Ends("E2BIG", out="E2BIG"),
        restricted=Ends("EPERM", out="EPERM"),
    ),
    Case(
        63,
        "its own process group killed",
        "import os; os.killpg(os.getpgrp(), 9)",
        Ends("`killed`, −9", "killed", -9),
        restricted=Ends("EPERM or `killed`", "error|killed", ANY),
    ),
]
