"""Cases about Python's own ways to end and to fail."""

from __future__ import annotations

from cases import Case, Ends

_ERROR = "error"
_MEGABYTE = b"0123456789abcdef" * 65536
_STATE = (
    "import builtins, math, os, random, sys\nprint(hasattr(builtins, 'leak'), math.pi == 1, hasattr(sys, 'leak'), "
    "'LEAK' in os.environ, os.listdir('.'))\nbuiltins.leak = math.pi = sys.leak = 1\nos.environ['LEAK'] = '1'\n"
    "random.seed(0)\nopen('leak', 'w')\nos.chdir('/')"
)

CASES = [
    Case(
        28,
        "deep recursion",
        "def f(): f()\nf()",
        Ends("RecursionError", _ERROR, 1, err="RecursionError"),
    ),
    Case(
        29,
        "C stack overflow",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: sorted([0], key=lambda _: f())\nf()",
        Ends("`killed`, −11", "killed", -11),
    ),
    Case(
        30,
        "invalid UTF-8, NUL, surrogates",
        "import os\nprint('\\ud800', 'é', flush=True)\nos.write(1, b'a\\xff\\x00b');",
        Ends("replaced, the rest kept", whole="\\ud800 é\na\ufffd\x00b4\n"),
    ),
    Case(31, "stdin: none", "import sys; print(repr(sys.stdin.read()))", Ends("EOF", whole="''\n")),
    Case(
        31,
        "stdin: 1 MB, read",
        "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())",
        Ends("complete", whole=f"{__import__('hashlib').sha256(_MEGABYTE).hexdigest()}\n"),
        request={"stdin": _MEGABYTE},
    ),
    Case(31, "stdin: 1 MB, unread", "print('a')", Ends("no deadlock", whole="a\n"), request={"stdin": _MEGABYTE}),
    *(
        Case(32, f"`sys.exit({value})`", f"import sys; sys.exit({value})", Ends(f"{code}", status, code))
        for value, code, status in (
            ("0", 0, "ok"),
            ("7", 7, _ERROR),
            ("'x'", 1, _ERROR),
            ("None", 0, "ok"),
            ("256", 0, "ok"),
        )
    ),
    Case(
        33,
        "`os._exit(5)` with unflushed output",
        "import os\nprint('a', end='')\nos._exit(5)",
        Ends("its code", _ERROR, 5),
    ),
    Case(
        36,
        "multiprocessing",
        "import multiprocessing as m\nprint(m.Pool(2).map(abs, [-1, 2]))",
        Ends("works", exit_code=0, whole="[1, 2]\n"),
        restricted=Ends("an exception", _ERROR, 1, err="(PermissionError|OSError|FileNotFoundError)"),
    ),
    Case(
        37,
        "subprocess: Python",
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout)",
        Ends("works", exit_code=0, whole="b'1\\n'\n"),
        restricted=Ends("PermissionError", _ERROR, 1, err="PermissionError"),
    ),
    Case(
        37,
        "subprocess: anything else",
        "import subprocess; subprocess.run(['ls'])",
        Ends("FileNotFoundError", _ERROR, 1, err="FileNotFoundError"),
        restricted=Ends("PermissionError", _ERROR, 1, err="PermissionError|FileNotFoundError"),
    ),
    Case(
        38,
        "missing module",
        "import no_such_module",
        Ends("traceback, 1", _ERROR, 1, err="ModuleNotFoundError: No module named 'no_such_module'"),
    ),
    Case(38, "SyntaxError", "x = = 1", Ends("traceback, 1", _ERROR, 1, err="SyntaxError: invalid syntax")),
    Case(
        39,
        "an exception whose repr raises",
        "class E(Exception):\n    def __repr__(self): raise E\n    __str__ = __repr__\nraise E",
        Ends("bounded", _ERROR, 1, err="E: <exception str"),
    ),
    Case(
        39,
        "an exception whose repr is 1 GB",
        "class E(Exception):\n    def __str__(self): return 'x' * (1 << 30)\nraise E",
        Ends("bounded", "error|memory|output_limit"),
        config={"memory_mb": 256},
    ),
    Case(
        39,
        "an exception whose repr is 16 MB",
        "class E(Exception):\n    def __str__(self): return 'x' * (1 << 24)\nraise E",
        Ends("`output_limit`", "output_limit", None, truncated=True),
    ),
    Case(
        41,
        "a scan for descriptors",
        "import os\nfound = []\nfor fd in range(1024):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
        "    except OSError: pass\nprint(found)",
        Ends("0–2", whole="[0, 1, 2]\n"),
    ),
    Case(
        42,
        "state between runs",
        _STATE,
        Ends("none", whole="False False False False []\n"),
    ),
    Case(42, "the same again", _STATE, Ends("none", whole="False False False False []\n")),
    Case(
        87,
        "`sys.modules` and builtins emptied",
        "import sys, builtins\nsys.modules.clear()\nbuiltins.__dict__.clear()",
        Ends("`error`", _ERROR, 1),
    ),
    Case(
        88,
        "the runner's frames cleared",
        "import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\nf.f_globals.clear()",
        Ends("only its own run", "ok|error"),
    ),
    Case(
        89,
        "sys.settrace, audit hooks, os._exit replaced",
        "import sys, os\nsys.addaudithook(lambda *a: None)\nos._exit = print\nsys.setswitchinterval(1e-6)\nprint('a')",
        Ends("only its own run", "ok|error|timeout", out="a.*"),
        timeout_s=2,
    ),
]
