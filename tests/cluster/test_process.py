"""A child that takes all of its own along: real programs, of which none may be left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from retool.cluster.process import Child

LIMIT_S = 20.0
HELPERS = """
import os, signal, sys, time
def note(name):
    with open(os.path.join({place!r}, name + ".aside"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join({place!r}, name + ".aside"), os.path.join({place!r}, name))
def wait_for(name):
    while not os.path.exists(os.path.join({place!r}, name)):
        time.sleep(0.01)
def fork(name, work):
    if not os.fork():
        note(name)
        try:
            work()
        finally:
            os._exit(0)
def daemon():
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
def read_stdin():
    sys.stdin.buffer.read()
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where programs leave their numbers. A test that failed leaves none of them running."""
    yield tmp_path
    for file in tmp_path.glob("pid-*"):
        if (left := alive(tmp_path, file.name)) is not None:
            left.kill()


def child_of(place: Path, body: str, **environment: str) -> Child:
    (place / "program.py").write_text(HELPERS.format(place=str(place)) + textwrap.dedent(body))
    return Child([str(place / "program.py")], environment, place / "log.txt", grace_s=0.5, kill_s=5.0)


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def code_of(child: Child) -> int:
    until(lambda: child.poll() is not None)
    code = child.poll()
    assert code is not None
    return code


def alive(place: Path, name: str) -> psutil.Process | None:
    """The process that noted its number under that name, where it still runs (a zombie does not)."""
    try:
        found = psutil.Process(int((place / name).read_text()))
        return found if found.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def all_alive(place: Path, *names: str) -> bool:
    until(lambda: all((place / name).exists() for name in names))
    return all(alive(place, name) for name in names)


# --- a child by itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_the_exit_code(ending: str, code: int, place: Path) -> None:
    with child_of(place, ending) as child:
        assert code_of(child) == code
    assert child.poll() == code


def test_what_it_prints_is_added_to_the_log(place: Path) -> None:
    (place / "log.txt").write_text("before\n")
    with child_of(
        place, "print('out', os.environ['ADDED'], flush=True); print('err', file=sys.stderr)", ADDED="x"
    ) as child:
        code_of(child)
    assert (place / "log.txt").read_text() == "before\nout x\nerr\n"


def test_while_it_runs_there_is_no_code(place: Path) -> None:
    with child_of(place, "note('pid-child'); read_stdin()") as child:
        until(lambda: (place / "pid-child").exists())
        assert child.poll() is None
    assert child.poll() == 0


def test_leaving_the_block_closes_its_standard_input_first(place: Path) -> None:
    """It ends as it wants to, with the time that it needs."""
    with child_of(place, "note('pid-child'); read_stdin(); time.sleep(0.3); print('good bye'); sys.exit(5)") as child:
        until(lambda: (place / "pid-child").exists())
    assert child.poll() == 5
    assert (place / "log.txt").read_text() == "good bye\n"


def test_ctrl_c_on_the_terminal_is_not_for_it(place: Path) -> None:
    with child_of(place, "note('pid-child'); read_stdin()"):
        until(lambda: (place / "pid-child").exists())
        pid = int((place / "pid-child").read_text())
        assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


# --- and all of its own -----------------------------------------------------------------------------------------------


def test_a_child_that_ends_is_not_waited_for(place: Path) -> None:
    started = time.monotonic()
    with child_of(place, "") as child:
        code_of(child)
    assert time.monotonic() - started < 5  # far below GRACE_S


def test_children_of_the_child_end_with_the_block(place: Path) -> None:
    body = """
        fork("pid-one", daemon)
        fork("pid-two", lambda: (fork("pid-three", daemon), time.sleep(600)))
        read_stdin()
    """
    with child_of(place, body) as child:
        assert all_alive(place, "pid-one", "pid-two", "pid-three")
        assert child.poll() is None
    assert not any(alive(place, name) for name in ("pid-one", "pid-two", "pid-three"))
    assert child.poll() == 0


def test_one_whose_parent_has_gone_ends_too(place: Path) -> None:
    """A daemon in a session of its own, which belongs to the init process by the time that the block is left."""
    body = """
        fork("pid-between", lambda: (fork("pid-daemon", daemon), wait_for("go")))
        wait_for("go")
        os.wait()
        note("gone")
        read_stdin()
    """
    with child_of(place, body) as child:
        assert all_alive(place, "pid-between", "pid-daemon")
        child.poll()  # as Watch does, three times a second
        (place / "go").touch()
        until(lambda: (place / "gone").exists())
        daemon = alive(place, "pid-daemon")
        assert daemon is not None and daemon.ppid() != int((place / "pid-between").read_text())
    assert alive(place, "pid-daemon") is None


def test_one_that_nobody_saw_ends_too(place: Path) -> None:
    body = """
        fork("pid-between", lambda: fork("pid-daemon", daemon))
        os.wait()
        note("gone")
        read_stdin()
    """
    with child_of(place, body) as child:
        until(lambda: (place / "gone").exists())
        assert all_alive(place, "pid-daemon")
        child.poll()
    assert alive(place, "pid-daemon") is None


def test_those_of_a_child_that_crashed_end_too(place: Path) -> None:
    """Its children are the init process's then."""
    body = """
        fork("pid-daemon", daemon)
        wait_for("go")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with child_of(place, body) as child:
        assert all_alive(place, "pid-daemon")
        child.poll()
        (place / "go").touch()
        assert code_of(child) == -9
        assert alive(place, "pid-daemon")
    assert alive(place, "pid-daemon") is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_ends_them_and_goes_on(error: type[BaseException], place: Path) -> None:
    with (
        pytest.raises(error, match="mine"),
        child_of(place, "fork('pid-daemon', daemon); note('pid-child'); read_stdin()"),
    ):
        assert all_alive(place, "pid-child", "pid-daemon")
        raise error("mine")
    assert not alive(place, "pid-child") and not alive(place, "pid-daemon")


def test_a_child_that_listens_to_nothing_is_killed(place: Path) -> None:
    started = time.monotonic()
    with child_of(place, "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('pid-child'); time.sleep(600)") as child:
        assert all_alive(place, "pid-child")
    assert alive(place, "pid-child") is None
    assert child.poll() == -signal.SIGKILL
    assert 1.0 <= time.monotonic() - started < 10  # it had its time


def test_a_stopped_child_is_killed_too(place: Path) -> None:
    with child_of(place, "note('pid-child'); os.kill(os.getpid(), signal.SIGSTOP)") as child:
        until(lambda: (place / "pid-child").exists())
        found = alive(place, "pid-child")
        assert found is not None
        until(lambda: found.status() == psutil.STATUS_STOPPED)
    assert alive(place, "pid-child") is None
    assert child.poll() == -signal.SIGKILL


def test_others_are_left_alone(place: Path) -> None:
    """A process of ours that the child did not start, in the same group as we are."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with child_of(place, "fork('pid-daemon', daemon); read_stdin()") as child:
            assert all_alive(place, "pid-daemon")
            child.poll()
        assert alive(place, "pid-daemon") is None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# --- whoever started it is killed -------------------------------------------------------------------------------------

FOLLOWS = """
from retool.cluster.main import _follow_parent
{first}
_follow_parent()
note("pid-child")
{then}
"""
PARENT = """
import sys, time
from pathlib import Path
from retool.cluster.process import Child
with Child([sys.argv[1]], {}, Path(sys.argv[2])):
    time.sleep(600)
"""


def following(place: Path, then: str, first: str = "") -> Child:
    """One that follows its parent."""
    return child_of(place, FOLLOWS.format(first=first, then=then))


def kill_the_parent(place: Path, first: str = "") -> None:
    """Start the child through a program of its own, and SIGKILL that."""
    following(place, "time.sleep(600)", first)
    command = [sys.executable, "-c", PARENT, str(place / "program.py"), str(place / "log.txt")]
    parent = subprocess.Popen(command)
    try:
        assert all_alive(place, "pid-child")
    finally:
        parent.kill()
        parent.wait()


def test_a_killed_parent_takes_its_child_along(place: Path) -> None:
    """Nobody leaves a block then: the child's standard input ends."""
    kill_the_parent(place)
    until(lambda: alive(place, "pid-child") is None)


def test_the_child_may_clean_up_first(place: Path) -> None:
    kill_the_parent(place, "signal.signal(signal.SIGTERM, lambda *_: (print('cleaned up', flush=True), os._exit(0)))")
    until(lambda: alive(place, "pid-child") is None)
    assert (place / "log.txt").read_text() == "cleaned up\n"


def test_a_child_that_ends_by_itself_is_not_held_up(place: Path) -> None:
    """The thread that waits for the end of standard input must not keep Python from ending, nor from its exit code."""
    with following(place, "sys.exit(4)") as child:
        assert code_of(child) == 4
    assert (place / "log.txt").read_text() == ""


def test_leaving_the_block_is_sigterm_to_one_that_follows(place: Path) -> None:
    with following(place, "time.sleep(600)") as child:
        assert all_alive(place, "pid-child")
    assert child.poll() == -signal.SIGTERM
