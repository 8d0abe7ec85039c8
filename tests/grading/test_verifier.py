"""The process around math-verify: bounded, counted, mended, and gone when it is not wanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retool.errors import InfraError
from retool.grading.verifier import Counts, Verifier

ANSWERING = """
import json, os, sys, time
print('ready', flush=True)
for line in sys.stdin:
    prediction, truth, plain = json.loads(line)
    if prediction == 'hang': time.sleep(1000)
    if prediction == 'die': os._exit(3)
    if prediction == 'half': sys.stdout.write('1'); sys.stdout.flush(); time.sleep(1000)
    if prediction == 'rubbish': print('maybe', flush=True); continue
    print(int(prediction == truth), flush=True)
"""


@pytest.fixture
def verifier(tmp_path: Path) -> Iterator[Verifier]:
    worker = tmp_path / "worker.py"
    worker.write_text(ANSWERING)
    made = Verifier(limit_s=0.3, worker=worker)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(verifier: Verifier) -> int:
    assert verifier._process is not None
    return verifier._process.pid


def test_nothing_is_started_before_it_is_asked(verifier: Verifier) -> None:
    assert verifier._process is None
    assert verifier.same("a", "a") and not verifier.same("a", "b")
    assert verifier.counts == Counts(hard=2)


@pytest.mark.parametrize(("prediction", "counts"), [
    ("hang", Counts(hard=1, timeouts=1)),
    ("half", Counts(hard=1, timeouts=1)),
    ("die", Counts(hard=1, crashes=1)),
    ("rubbish", Counts(hard=1, crashes=1)),
])  # fmt: skip
def test_what_goes_wrong_is_wrong_counted_and_mended(verifier: Verifier, prediction: str, counts: Counts) -> None:
    assert not verifier.same(prediction, prediction)
    assert verifier.counts == counts
    assert verifier.same("a", "a")
    assert verifier.counts.hard == 2 and verifier.counts.unjudged == 1
    assert not verifier.same(prediction, prediction), "remembered"
    assert verifier.counts.hard == 2


def test_a_process_that_was_killed_is_started_again(verifier: Verifier) -> None:
    assert verifier.same("a", "a")
    first = pid_of(verifier)
    os.kill(first, signal.SIGKILL)
    while verifier._process is not None and verifier._process.poll() is None:
        time.sleep(0.01)
    assert verifier.same("b", "b")
    assert pid_of(verifier) != first
    assert verifier.counts == Counts(hard=2)


def test_the_ended_process_is_gone(verifier: Verifier) -> None:
    verifier.same("a", "a")
    first = pid_of(verifier)
    verifier.same("hang", "x")
    assert not alive(first)
    verifier.same("b", "b")
    second = pid_of(verifier)
    verifier.close()
    assert not alive(second)
    assert verifier.same("c", "c"), "and comes back when it is asked again"


def test_a_budget_ends_the_asking(verifier: Verifier) -> None:
    with verifier.budget(0.2):
        assert not verifier.same("hang", "1")
        assert not verifier.same("a", "a")
    assert verifier.counts == Counts(hard=2, timeouts=1, over_budget=1)
    assert verifier.same("a", "a"), "not asked is not remembered"


def test_threads_share_it(verifier: Verifier) -> None:
    verdicts: dict[int, bool] = {}

    def ask(number: int) -> None:
        verdicts[number] = all(verifier.same(f"{number}.{i}", f"{number}.{i}") for i in range(20))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), True)
    assert verifier.counts == Counts(hard=160)


def test_a_forked_copy_has_a_process_of_its_own(verifier: Verifier) -> None:
    assert verifier.same("a", "a")
    first = pid_of(verifier)
    child = os.fork()
    if child == 0:
        right = verifier.same("b", "b") and pid_of(verifier) != first
        verifier.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pid_of(verifier) == first and verifier.same("c", "c")


def test_a_process_that_does_not_start_is_the_machines_fault(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(7)")
    with pytest.raises(InfraError, match=r"exit code 7"):
        Verifier(worker=worker).same("a", "a")


def test_the_process_dies_with_its_parent() -> None:
    """Also where the parent is killed in the middle of a pair that does not end."""
    program = (
        "import os, threading\n"
        "from retool.grading.verifier import Verifier\n"
        "v = Verifier(limit_s=600)\n"
        "v.same('1', 'x')\n"
        "print(v._process.pid, flush=True)\n"
        "v.same('(a+b+c+d)^{500}', '1729')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while alive(worker):
        time.sleep(0.01)


def test_memory_is_bounded() -> None:
    """A pair that would take all of it ends the process or fails inside it; the machine does not notice."""
    verifier = Verifier(limit_s=60)
    assert not verifier.same("9^{9^{9}}", "x")
    assert verifier.counts.unjudged <= 1
    assert verifier.same(r"\frac{1}{2}", r"\frac{2}{4}")
    verifier.close()
