"""Run one program inside a child, as ``python file.py`` would. Everything here happens in the untrusted process: what
it finds out is worth nothing to the supervisor, which reads pipes and the kernel's wait status.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TextIO

from retool.sandbox import display, jail

FILENAME = "<code>"
_USER_FILES = (FILENAME, "<string>")
"""Frames that a traceback shows: the program's own and what it gave to ``exec``. Library frames are left out: they
cost the model tokens and name paths of this machine."""
_FLUSH_FAILED = 120
"""CPython's exit code where stdout could not be flushed at the end (Py_FinalizeEx)."""


_REHEARSALS = 20
"""Python specialises a function's code after some calls, and caches what it looks up: what is settled in the zygote
need not be written, page by page, in every child."""


def warm_up() -> None:
    """Pay the first-time costs of everything that a child does for a program, in the zygote."""
    streams = sys.stdin, sys.stdout, sys.stderr
    here = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    for _ in range(_REHEARSALS):
        for source in ("print(1 + 1)", "x = 2\nx", "1 / 0", "x ="):
            main = Main(os.getcwd())
            main.wake_up()
            main.run(source)
            main.is_itself()
    sys.stdin, sys.stdout, sys.stderr = streams
    for descriptor, saved in zip((1, 2), here, strict=True):
        os.dup2(saved, descriptor)
        os.close(saved)
    os.close(null)
    linecache.clearcache()


class Main:
    """``__main__`` of one child, ready before the code is known: streams on descriptors 0–2, an empty namespace. The
    keeper makes one, and every fork of it has it fresh."""

    def __init__(self, folder: str) -> None:
        stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
        for name, stream in (("stdin", stdin), ("stdout", _writer(1)), ("stderr", _writer(2))):
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.argv = [FILENAME]
        # The zygote was started with a clean environment; only these differ from slot to slot.
        os.environ["HOME"] = os.environ["TMPDIR"] = os.environ["PWD"] = folder
        self.module = ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self.module
        self._pid = 0

    def wake_up(self) -> None:
        """In the child, while nobody waits for it yet: touch the pages that every program writes to, so that they are
        this process's own."""
        self._pid = os.getpid()
        for part in display.compile_program("print(end='')", FILENAME):
            exec(part, {})

    def is_itself(self) -> bool:
        """False in a process that the program forked, and that came back from it."""
        return os.getpid() == self._pid

    def run(self, source: str) -> int:
        """Run ``source`` as ``__main__``, wait for its threads, call its atexit functions, flush; the exit code.

        Python's own finalisation is left out: it would take milliseconds to tear down modules that die with the
        process."""
        code = guard(lambda: self._execute(source))
        if len(threading._active) > 1 or atexit._ncallbacks():  # type: ignore[attr-defined]
            for last in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
                code = guard(last) or code
        # Objects of the program close and flush what they hold. Daemon threads would miss their globals.
        if len(threading._active) == 1:  # type: ignore[attr-defined]
            guard(self.module.__dict__.clear)
        return _flush() or code

    def run_cell(self, source: str) -> int:
        """Run ``source`` in the namespace that earlier cells left; the exit code that it would have had."""
        return guard(lambda: self._execute(source)) or _flush()

    def _execute(self, source: str) -> None:
        linecache.cache[FILENAME] = (len(source), None, source.splitlines(keepends=True), FILENAME)
        for part in display.compile_program(source, FILENAME):
            exec(part, self.module.__dict__)


def lay_out(files: Mapping[str, bytes], stdin: bytes) -> None:
    """Put files into the working folder and ``stdin`` behind descriptor 0.

    Raises:
        OSError: no room, or a name is taken.
    """
    for name, data in files.items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(data)
    if stdin:
        # A file without a name, not a pipe: whoever does not read it must not block anybody.
        handle = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
        with open(handle, "wb", closefd=False) as file:
            file.write(stdin)
        os.lseek(handle, 0, os.SEEK_SET)
        os.dup2(handle, 0)
        os.close(handle)


def _writer(descriptor: int) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    # By lines, so that what was printed before a deadline is seen; the output cap bounds what that costs.
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def reseed() -> None:
    """Fresh random numbers for the next fork. Python does so by itself after os.fork, but only for ``random``; given
    whole numbers the generators are quick, while their own ways to draw a seed touch two hundred pages."""
    for name, most in (("random", 16), ("sympy.core.random", 16), ("numpy.random", 4)):
        module = sys.modules.get(name)
        if module is not None:
            generator = module.rng if name.startswith("sympy") else module
            generator.seed(int.from_bytes(os.urandom(most), "little"))


def guard(call: Any) -> int:
    """Call and turn the ending into an exit code, as Python does."""
    try:
        call()
    except SystemExit as ending:
        return _exit_code(ending.code)
    except BaseException as error:
        if isinstance(error, MemoryError):
            jail.release_memory_reserve()
        _report(error)
        return 1
    return 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF
    _say(f"{code}\n")
    return 1


def _report(error: BaseException) -> None:
    try:
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error, error.__traceback__)
            return
        shown = traceback.TracebackException.from_exception(error)
        if isinstance(error, SyntaxError) and not _user_frames(shown.stack):
            _say("".join(shown.format_exception_only()))
            return
        _keep_user_frames(shown, set())
        _say("".join(shown.format()))
    except BaseException as second:
        # An exception that cannot be printed still has a name.
        _say(("MemoryError" if isinstance(second, MemoryError) else type(error).__name__) + "\n")


def _say(text: str) -> None:
    """To sys.stderr, or past it where the program has broken it."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(2, text.encode("utf-8", "backslashreplace"))


def _user_frames(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    return [frame for frame in stack if frame.filename in _USER_FILES]


def _keep_user_frames(shown: traceback.TracebackException, seen: set[int]) -> None:
    todo = [shown]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if current.stack:
            current.stack = traceback.StackSummary.from_list(_user_frames(current.stack))
        todo += [linked for linked in (current.__cause__, current.__context__) if linked is not None]
        todo += getattr(current, "exceptions", None) or []


def _flush() -> int:
    """Flush what the program may have left in buffers; CPython's exit code where stdout could not take it."""
    code = 0
    streams: list[TextIO | None] = [sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__]
    for stream in streams:
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            code = _FLUSH_FAILED if stream in streams[:2] else code
    return code
