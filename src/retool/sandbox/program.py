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
from types import ModuleType
from typing import Any, TextIO

from retool.sandbox import display, jail

FILENAME = "<code>"
_USER_FILES = (FILENAME, "<string>")
"""Frames that a traceback shows: the program's own and what it gave to ``exec``. Library frames are left out: they
cost the model tokens and name paths of this machine."""
_FLUSH_FAILED = 120
"""CPython's exit code where stdout could not be flushed at the end (Py_FinalizeEx)."""


def warm_up() -> None:
    """Pay the first-time costs of compiling, showing a value and formatting a traceback in the zygote."""
    try:
        for part in display.compile_program("1 + 1\n1 / 0", FILENAME):
            exec(part, {})
    except ZeroDivisionError as error:
        shown = traceback.TracebackException.from_exception(error)
        _keep_user_frames(shown, set())
        "".join(shown.format())
    linecache.clearcache()


def prepare() -> ModuleType:
    """What can be done before the code is known: streams on descriptors 0–2, fresh random numbers, ``__main__``."""
    stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    for name, stream in (("stdin", stdin), ("stdout", _writer(1)), ("stderr", _writer(2))):
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [FILENAME]
    _reseed()
    # Touches the pages that the compiler writes to, so that they are this process's own before anybody waits for it.
    display.compile_program("print(1 + 1)", FILENAME)
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main


def _writer(descriptor: int) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    # By lines, so that what was printed before a deadline is seen; the output cap bounds what that costs.
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _reseed() -> None:
    # `random` itself reseeds after a fork; generators that libraries made at import do not.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    sympy_random = sys.modules.get("sympy.core.random")
    if sympy_random is not None:
        sympy_random.rng.seed()


def run(source: str, main: ModuleType) -> int:
    """Run ``source`` as ``__main__``, wait for its threads, call its atexit functions, flush; the exit code.

    Python's own finalisation is left out: it would take milliseconds to tear down modules that die with the process."""
    lines = source.splitlines(keepends=True)
    linecache.cache[FILENAME] = (len(source), None, lines, FILENAME)
    code = _guard(lambda: _execute(source, main))
    for last in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        code = _guard(last) or code
    # Objects of the program close and flush what they hold. Daemon threads would miss their globals.
    if threading.active_count() == 1:
        _guard(main.__dict__.clear)
    return _flush() or code


def _execute(source: str, main: ModuleType) -> None:
    for part in display.compile_program(source, FILENAME):
        exec(part, main.__dict__)


def _guard(call: Any) -> int:
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
