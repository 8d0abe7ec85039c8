"""What user code may try (those cases that this tier promises to contain), and what must come of it. After each, the
fixture asserts that the next run is correct and that no process, folder or descriptor is left."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from retool.types import ExecutionResult, ExecutionStatus

S = ExecutionStatus
Execute = Callable[..., ExecutionResult]
KIB = 1024

ENDINGS = {
    # name: (code, status, exit code)
    "endless loop": ("while True: pass", S.TIMEOUT, None),
    "sleeps": ("import time; time.sleep(1000)", S.TIMEOUT, None),
    "ignores every signal": (
        "import signal, time\nfor s in signal.valid_signals() - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(1000)",
        S.TIMEOUT,
        None,
    ),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", S.TIMEOUT, None),
    "hanging atexit": ("import atexit, time; atexit.register(time.sleep, 1000)", S.TIMEOUT, None),
    "non-daemon thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        S.TIMEOUT,
        None,
    ),
    "daemon thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
        S.OK,
        0,
    ),
    "waits for a child": ("import os, time\nif os.fork(): os.wait()\nelse: time.sleep(1000)", S.TIMEOUT, None),
    "one large list": ("x = [0] * 10**10", S.MEMORY, 1),
    "grows": ("x = []\nwhile True: x.append(bytearray(4 << 20))", S.MEMORY, 1),
    "grows in small steps": ("x = ()\nwhile True: x = (x, [0] * 1000)", S.MEMORY, 1),
    "grows in a function": ("def f():\n    x = []\n    while True: x.append(' ' * (1 << 20))\nf()", S.MEMORY, 1),
    "shared memory": ("import mmap\nx = [mmap.mmap(-1, 1 << 20) for _ in range(10**4)]", S.MEMORY, 1),
    "raises its own limit": (
        "import resource as r\ntry:\n    r.setrlimit(r.RLIMIT_AS, (-1, -1))\n"
        "except (ValueError, OSError):\n    print('no')",
        S.OK,
        0,
    ),
    "catches MemoryError": ("try:\n    [0] * 10**10\nexcept MemoryError:\n    print('caught')", S.OK, 0),
    "C stack overflow": (
        "import sys, threading\nsys.setrecursionlimit(10**9)\nf = lambda: sorted([0], key=lambda _: f())\nf()",
        S.KILLED,
        -11,
    ),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", S.KILLED, -9),
    "aborts": ("import os; os.abort()", S.KILLED, -6),
    "closes descriptors": ("import os; os.closerange(0, 256)", S.OK, 0),
    "closes and exits": ("import os; os.closerange(0, 256); os._exit(0)", S.OK, 0),
    "closes streams": ("import sys; print('a'); sys.stdout.close(); sys.stderr.close()", S.OK, 0),
    "deletes its folder": ("import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)", S.OK, 0),
    "many files": ("for i in range(100): open(str(i), 'w')", S.OK, 0),
    "deep folders": ("import os\nfor _ in range(300): os.mkdir('d'); os.chdir('d')", S.OK, 0),
    "locked folder": (
        "import os\nos.makedirs('a/b'); open('a/b/c', 'w'); os.chmod('a/b', 0)",
        S.OK,
        0,
    ),
    "large file": ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", S.ERROR, 1),
    "too many descriptors": ("import os\nwhile True: os.dup(0)", S.ERROR, 1),
    "repr raises": (
        "class E(Exception):\n    def __repr__(self): raise E\n    __str__ = __repr__\nraise E",
        S.ERROR,
        1,
    ),
    "result's repr raises": ("class R:\n    def __repr__(self): raise ValueError\nR()", S.ERROR, 1),
    "repr of half a GiB": (
        "class E(Exception):\n    def __str__(self): return 'x' * (1 << 29)\nraise E",
        S.ERROR,  # Python's own answer: <exception str() failed>
        1,
    ),
    "repr of 16 MiB": (
        "class E(Exception):\n    def __str__(self): return 'x' * (1 << 24)\nraise E",
        S.OUTPUT_LIMIT,
        None,
    ),
    "breaks the runner": ("import sys, builtins\nsys.modules.clear()\nbuiltins.__dict__.clear()", S.ERROR, 1),
}
SMALL = {
    "one large list",
    "shared memory",
    "repr of half a GiB",
    *(name for name in ENDINGS if name.startswith("grows")),
}
"""Run with less memory, so that they meet their limit soon."""


@pytest.mark.parametrize("name", ENDINGS)
def test_ending(execute: Execute, name: str) -> None:
    code, status, exit_code = ENDINGS[name]
    timeout_s = 0.5 if status is S.TIMEOUT else 30.0
    result = execute(code, timeout_s, memory_mb=128 if name in SMALL else 512)
    if result.tier == "restricted" and re.search("fork|chmod", code):
        pytest.skip("the tier refuses what this does")
    assert (result.status, result.exit_code) == (status, exit_code), result
    if status is S.TIMEOUT:
        assert result.duration_s >= timeout_s
    if name == "raises its own limit":
        assert result.stdout == "no\n"


def test_output_before_a_limit_is_kept(execute: Execute) -> None:
    assert execute("print('a')\nwhile True: pass", 0.5).stdout == "a\n"
    assert execute("print('a')\nimport os\nos.abort()").stdout == "a\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("ends", [True, False])
def test_output_is_cut_to_the_exact_prefix(execute: Execute, stream: str, ends: bool) -> None:
    code = (
        f"import sys\nprint('other', file=sys.{'stderr' if stream == 'stdout' else 'stdout'})\n"
        f"for i in range({700_000 if ends else 10**12}): print(i, file=sys.{stream})"
    )
    result = execute(code, output_kb=8)
    expected = "".join(f"{i}\n" for i in range(3000))[: 8 * KIB]
    assert (result.status, result.exit_code, result.truncated) == (S.OUTPUT_LIMIT, None, True)
    assert getattr(result, stream) == expected
    assert {result.stdout, result.stderr} == {expected, "other\n"}


def test_output_that_just_fits_is_whole(execute: Execute) -> None:
    result = execute(f"print('x' * {8 * KIB - 1})", output_kb=8)
    assert (result.status, len(result.stdout), result.truncated) == (S.OK, 8 * KIB, False)
    result = execute(f"print('x' * {8 * KIB})", output_kb=8)
    assert (result.status, len(result.stdout), result.truncated) == (S.OUTPUT_LIMIT, 8 * KIB, True)


def test_a_character_is_not_cut_in_two(execute: Execute) -> None:
    result = execute("print('x' + 'é' * 5000)", output_kb=1)
    assert result.stdout == "x" + "é" * 511
    assert result.status is S.OUTPUT_LIMIT


ORPHANS = {
    "grandchild holds stdout": "import os, time\nif os.fork(): print('done')\nelse: time.sleep(1000)",
    "new session": "import os, time\nif os.fork(): print('done')\nelse:\n    os.setsid()\n    time.sleep(1000)",
    "double fork": (
        "import os, time\nif os.fork():\n    os.wait()\n    print('done')\nelse:\n    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n    os.setsid()\n    time.sleep(1000)"
    ),
    "subprocess": "import subprocess, sys\nwait = 'while 1: pass'\n"
    "subprocess.Popen([sys.executable, '-c', wait], start_new_session=True)\nprint('done')",
    "no environment": (
        "import subprocess, sys\nwait = 'while 1: pass'\n"
        "subprocess.Popen([sys.executable, '-c', wait], start_new_session=True, env={})\nprint('done')"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORPHANS)
@pytest.mark.parametrize("deadline", [False, True])
def test_descendants_die_and_delay_nothing(execute: Execute, name: str, deadline: bool) -> None:
    code = ORPHANS[name] + ("\nwhile True: pass" if deadline else "")
    result = execute(code, 1.0 if deadline else 100.0)
    if result.tier == "restricted":
        pytest.skip("no new processes")
    assert result.stdout == "done\n"
    assert result.status is (S.TIMEOUT if deadline else S.OK)


def test_environment_holds_no_secret(execute: Execute) -> None:
    code = "import os\nprint(*sorted(k for k in os.environ if not k.endswith('_NUM_THREADS')), sep='\\n')"
    known = {"PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "PWD", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "RETOOL_SANDBOX"}
    assert set(execute(code).stdout.split()) - {"LD_LIBRARY_PATH"} == known


def test_program_holds_descriptors_0_to_2_only(execute: Execute) -> None:
    code = (
        "import os\nfound = []\nfor fd in range(1024):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
        "    except OSError:\n        pass\nprint(found)"
    )
    assert execute(code).stdout == "[0, 1, 2]\n"


def test_forged_answers_change_nothing(execute: Execute) -> None:
    code = (
        "import os, sys\nfor fd in range(3, 1024):\n    try:\n        os.write(fd, b'\\x03' * 100)\n"
        '    except OSError:\n        pass\nprint(\'{"status": "ok"}\')\nsys.exit(3)'
    )
    result = execute(code)
    assert (result.status, result.exit_code) == (S.ERROR, 3)


def test_kernel_attributes_of_the_jail(execute: Execute) -> None:
    code = (
        "import os, resource as r\nlines = open('/proc/self/status').read().splitlines()\n"
        "status = dict(line.split(':\\t') for line in lines)\n"
        "print(status['NoNewPrivs'], int(status['CapEff'], 16), os.getsid(0) == os.getpid(), oct(os.umask(0)))\n"
        "print(r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CPU)[0] > 0)"
    )
    result = execute(code)
    if result.tier == "restricted":
        pytest.skip("no /proc")
    assert result.stdout == "1 0 True 0o77\n(0, 0) (256, 256) True\n"
