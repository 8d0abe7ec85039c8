"""What a program sees of Python, end to end through a real sandbox."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, ExecutionStatus

OK, ERROR = ExecutionStatus.OK, ExecutionStatus.ERROR
Execute = Callable[..., ExecutionResult]


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("print(1 + 1)", "2\n"),
        ("1 + 1", "2\n"),
        ("", ""),
        ("if __name__ == '__main__':\n    print('yes')", "yes\n"),
        ("import sys; sys.stdin.read()", "''\n"),
        ("import sys; print(sys.argv)", "['<code>']\n"),
        ("import os; print(os.listdir('.'), os.environ['HOME'] == os.getcwd())", "[] True\n"),
        ("import tempfile, os; print(os.path.dirname(tempfile.mkdtemp()) == os.getcwd())", "True\n"),
        ("open('a', 'w').write('x'); print(open('a').read())", "x\n"),
        ("import threading as t, time\nt.Thread(target=lambda: (time.sleep(.05), print('t'))).start()", "t\n"),
        ("import atexit\natexit.register(print, 'bye')\nprint('hi')", "hi\nbye\n"),
        ("import multiprocessing as m\nprint(m.Pool(2).map(abs, [-1, 2]))", "[1, 2]\n"),
        ("from concurrent.futures import ThreadPoolExecutor as T\nprint(list(T(2).map(abs, [-1])))", "[1]\n"),
        ("import subprocess as s, sys; print(s.run([sys.executable, '-c', 'print(1)'], "
        "capture_output=True).stdout)", "b'1\\n'\n"),
        ("f = open(1, 'w', closefd=False)\nf.write('kept');", "4\nkept"),
        ("class D:\n    def __del__(self): print('del')\nd = D()", "del\n"),
        ("def f(n):\n    return f(n - 1)\ntry:\n    f(10**6)\nexcept RecursionError:\n    print('deep')", "deep\n"),
        ("print('é' * 3, '\\x00', '\\ud800')", "ééé \x00 \\ud800\n"),
        ("import os; os.write(1, b'a\\xff\\x00b')", "a\ufffd\x00b4\n"),
        ("import os; os.system(':'); print(len(os.listdir('/proc/self/fd')))", "4\n"),  # 0-2 and the listing itself
    ],
)  # fmt: skip
def test_ok(execute: Execute, code: str, stdout: str) -> None:
    result = execute(code)
    if result.tier == "restricted" and re.search("multiprocessing|subprocess|system|/proc", code):
        pytest.skip("no new processes, no /proc")
    assert (result.status, result.stdout, result.stderr, result.exit_code) == (OK, stdout, "", 0)
    assert result.duration_s > 0 and not result.truncated


@pytest.mark.parametrize(
    ("ending", "exit_code", "stderr"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('x')", 1, "x\n"),
        ("sys.exit(None)", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(256)", 0, ""),
        ("sys.exit(-1)", 255, ""),
        ("sys.exit(True)", 1, ""),
        ("sys.exit([1])", 1, "[1]\n"),
        ("exit()", 0, ""),
        ("quit(3)", 3, ""),
        ("os._exit(9)", 9, ""),
        ("raise SystemExit", 0, ""),
    ],
)
def test_exit_codes(execute: Execute, ending: str, exit_code: int, stderr: str) -> None:
    result = execute(f"import os, sys\nprint('before')\n{ending}\nprint('after')")
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, stderr, "before\n")
    assert result.status is (OK if exit_code == 0 else ERROR)


def test_os_exit_keeps_its_code_with_output_unflushed(execute: Execute) -> None:
    result = execute("import os\nprint('a', end='')\nos._exit(5)")
    assert (result.status, result.exit_code) == (ERROR, 5)


def test_traceback_shows_only_the_programs_frames(execute: Execute) -> None:
    result = execute("def f(x):\n    return 1 / x\n\nprint('a')\nf(0)\n")
    assert (result.status, result.exit_code, result.stdout) == (ERROR, 1, "a\n")
    assert result.stderr == (
        "Traceback (most recent call last):\n"
        '  File "<code>", line 5, in <module>\n    f(0)\n'
        '  File "<code>", line 2, in f\n    return 1 / x\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


def test_library_frames_are_left_out_and_causes_kept(execute: Execute) -> None:
    code = "import json\ntry:\n    json.loads('{')\nexcept ValueError as e:\n    raise KeyError('k') from e"
    lines = execute(code).stderr.splitlines()
    assert [line.strip() for line in lines if "File" in line] == [
        'File "<code>", line 3, in <module>',
        'File "<code>", line 5, in <module>',
    ]
    assert any(line.startswith("json.decoder.JSONDecodeError: ") for line in lines)
    assert lines[-1] == "KeyError: 'k'"


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = = 1", "SyntaxError: invalid syntax"),
        ("def f(:\n  pass", "SyntaxError: invalid syntax"),
        ("  x = 1", "IndentationError: unexpected indent"),
        ("eval('1 +')", "SyntaxError: invalid syntax"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise ExceptionGroup('g', [ValueError('v')])", "    +------------------------------------"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E: <exception str() failed>"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys\nsys.stderr = None\n1/0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.excepthook = lambda *a: print('mine', file=sys.stderr)\n1/0", "mine"),
    ],
)
def test_errors_end_in_their_name(execute: Execute, code: str, last: str) -> None:
    result = execute(code)
    assert (result.status, result.exit_code) == (ERROR, 1)
    assert result.stderr.rstrip("\n").split("\n")[-1] == last


def test_syntax_error_looks_like_pythons(execute: Execute) -> None:
    assert execute("y = 1\nx = = 1").stderr == (
        '  File "<code>", line 2\n    x = = 1\n        ^\nSyntaxError: invalid syntax\n'
    )


@pytest.mark.parametrize("code", ["x = 1\x00", "print('\ud800')", "\udcff"])
def test_impossible_source_is_the_programs_error(execute: Execute, code: str) -> None:
    result = execute(code)
    assert (result.status, result.exit_code) == (ERROR, 1)
    assert "Error" in result.stderr


def test_large_source_arrives_whole(execute: Execute) -> None:
    result = execute(f"x = '{'a' * 3_000_000}'\nprint(len(x))")
    assert (result.status, result.stdout) == (OK, "3000000\n")


def test_no_state_between_runs(execute: Execute) -> None:
    dirty = (
        "import builtins, math, os, random, sys\nbuiltins.leak = math.pi = sys.leak = 1\nos.chdir('/')\n"
        "os.environ['LEAK'] = '1'\nopen(os.path.join(os.environ['HOME'], 'leak'), 'w')\nrandom.seed(0)"
    )
    look = (
        "import builtins, math, os, sys\nprint(hasattr(builtins, 'leak'), math.pi == 1, hasattr(sys, 'leak'), "
        "os.getcwd() == '/', 'LEAK' in os.environ, os.listdir('.'))"
    )
    for _ in range(4):
        assert execute(dirty).status is OK
        assert execute(look).stdout == "False False False False False []\n"


def test_random_numbers_differ_but_set_order_does_not(execute: Execute) -> None:
    random = {execute("import random; print(random.random())").stdout for _ in range(8)}
    assert len(random) == 8
    orders = {execute("print({str(i) for i in range(30)})").stdout for _ in range(4)}
    assert len(orders) == 1


def test_libraries_generators_are_reseeded() -> None:
    code = "import numpy.random as n, sympy.core.random as s\nprint(n.rand(), s.rng.random())"

    async def scenario() -> list[str]:
        async with LocalSandbox(SandboxConfig(workers=2, preload=["numpy", "sympy", "no_such_module"])) as sandbox:
            assert sandbox.info is not None
            assert sandbox.info.modules == ("numpy", "sympy")
            assert sandbox.info.skipped[0].startswith("no_such_module: ModuleNotFoundError")
            return [(await sandbox.execute(code, 20)).stdout for _ in range(3)]

    pairs = [line.split() for line in asyncio.run(scenario())]
    assert len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs}) == 3
