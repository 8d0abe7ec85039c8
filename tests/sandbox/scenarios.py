"""What takes more than one program, run inside a worker (``tiers``): ``async def name(sandbox, **arguments)``.
Nothing may be left after any of them; the worker looks."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from typing import Any

from cases import TOOLS
from leftovers import below, count_descriptors, descendants, describe, launcher_pid, reaped, until

from retool.sandbox import LocalSandbox
from retool.types import ExecutionRequest, ExecutionStatus

S = ExecutionStatus
SLEEP = "import time; time.sleep(1000)"


async def _started(sandbox: LocalSandbox, running: int) -> None:
    await until(lambda: sandbox.running == running and not sandbox.waiting)
    await asyncio.sleep(0.05)  # the children have begun to read


async def _as_before(sandbox: LocalSandbox) -> None:
    """Nothing lives but launcher, zygote, and for each slot a keeper and its child."""
    await until(lambda: len(below(sandbox)) <= 2 + 2 * sandbox.workers, state=lambda: describe(below(sandbox)))


async def _right(sandbox: LocalSandbox, times: int = 4) -> None:
    for index in range(times):
        assert (await sandbox.execute(f"print({index})", 30)).stdout == f"{index}\n"


# -- siblings ----------------------------------------------------------------------------------------------------------

_HIDE = """
import os, socket, time
open('secret-file', 'w').write('s3cret')
secret = 's3' + 'cret'
try:
    open('/dev/shm/secret-file', 'w').write(secret)
    s = socket.socket(socket.AF_UNIX)
    s.bind('\\0secret-socket')
    s.listen()
except OSError:
    pass
print(os.getpid(), flush=True)
time.sleep(2)
print('whole', sorted(os.listdir('.')))
"""
_SEEK = """
import glob, signal, socket
found = []
for pid in range(1, 400):
    if pid != os.getpid() and pid != os.getppid():
        if tried(os.kill, pid, signal.SIGKILL) == 'done': found.append(pid)
try: os.kill(-1, signal.SIGKILL)
except OSError: pass
for name in ('\\0secret-socket',):
    try:
        socket.socket(socket.AF_UNIX).connect(name)
        found.append(name)
    except OSError: pass
places = [os.path.dirname(os.getcwd()), '/tmp', '/dev/shm']
places += glob.glob('/proc/[0-9]*/root/tmp') + glob.glob('/proc/[0-9]*/cwd')
for place in places:
    for name in ('secret-file', '0/secret-file', '1/secret-file', '2/secret-file', '3/secret-file'):
        try: found.append(open(os.path.join(place, name)).read())
        except OSError: pass
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    if str(os.getpid()) not in path and '/1/' not in path:
        try: open(path).read(); found.append(path)
        except OSError: pass
print(found)
"""


async def siblings(sandbox: LocalSandbox) -> list[str]:
    """One looks for the other by all means."""
    hidden = asyncio.ensure_future(sandbox.execute(_HIDE, 30))
    await _started(sandbox, 1)
    seeker = await sandbox.execute(TOOLS + _SEEK, 30)
    whole = await hidden
    assert whole.status is S.OK and "whole" in whole.stdout, whole
    await _right(sandbox)
    return [seeker.stdout, seeker.stderr]


# -- faults ------------------------------------------------------------------------------------------------------------


async def zygote_killed(sandbox: LocalSandbox, runs: int, victim: str) -> list[str]:
    """Statuses of ``runs`` calls, some of which run and some of which wait, when a process of ours is killed."""
    calls = [
        asyncio.ensure_future(sandbox.execute(f"import time; time.sleep(.3); print({n})", 30)) for n in range(runs)
    ]
    await until(lambda: sandbox.running == sandbox.workers)
    await asyncio.sleep(0.1)
    zygote = sandbox.zygote_pid
    assert zygote is not None
    os.kill(zygote if victim == "zygote" else launcher_pid(sandbox), signal.SIGKILL)
    results = await asyncio.gather(*calls)
    for index, result in enumerate(results):
        assert result.status in (S.OK, S.INFRA), result
        assert result.stdout == (f"{index}\n" if result.status is S.OK else ""), result
    await _right(sandbox)
    assert sandbox.zygote_pid != zygote
    await until(lambda: reaped(zygote))
    return [str(result.status) for result in results]


async def keeper_killed(sandbox: LocalSandbox, runs: int) -> list[str]:
    """The same when all the slots' keepers are killed, but not the zygote."""
    calls = [
        asyncio.ensure_future(sandbox.execute(f"import time; time.sleep(.3); print({n})", 30)) for n in range(runs)
    ]
    await until(lambda: sandbox.running == sandbox.workers)
    zygote = sandbox.zygote_pid
    assert zygote is not None
    for keeper in _children(zygote):
        os.kill(keeper, signal.SIGKILL)
    results = await asyncio.gather(*calls)
    await _right(sandbox)
    assert sandbox.zygote_pid == zygote
    return [str(result.status) for result in results]


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


async def slow_end(sandbox: LocalSandbox) -> tuple[str, float]:
    """A run whose end the kernel does not tell of: its keeper stands still, as it would over a process that cannot be
    killed. Another slot serves on; then the slot comes back."""
    assert sandbox.zygote_pid is not None
    call = asyncio.ensure_future(sandbox.execute(SLEEP, 0.5))
    await _started(sandbox, 1)
    keepers = _children(sandbox.zygote_pid)
    for keeper in keepers:
        os.kill(keeper, signal.SIGSTOP)
    start = time.monotonic()
    result = await call
    waited = time.monotonic() - start
    for keeper in keepers:
        os.kill(keeper, signal.SIGCONT)
    await _right(sandbox)
    return str(result.status), waited


async def cancelled(sandbox: LocalSandbox) -> None:
    """Those who ask go away, in line and at work."""
    for _ in range(5):
        calls = [asyncio.ensure_future(sandbox.execute(SLEEP, 1000)) for _ in range(6)]
        session = asyncio.ensure_future(sandbox.execute(SLEEP, 1000, session="s"))
        await until(lambda: sandbox.running == sandbox.workers)
        for call in [*calls, session]:
            call.cancel()
        ends = await asyncio.gather(*calls, session, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        sandbox.release("s")
        assert (sandbox.running, sandbox.waiting) == (0, 0)
        await _right(sandbox)
    await _as_before(sandbox)


async def mixed(sandbox: LocalSandbox, runs: int) -> tuple[int, int]:
    """Kilobytes and descriptors of this process that ``runs`` runs of all kinds have cost after the first tenth."""
    kinds: list[tuple[str, float, ExecutionStatus]] = [
        ("print({})", 30, S.OK),
        ("print({}); 1 / 0", 30, S.ERROR),
        ("print({}, flush=True)\nwhile True: pass", 0.3, S.TIMEOUT),
        ("import os; print({}, flush=True); os.abort()", 30, S.KILLED),
        ("open('a', 'w').write('x' * 100000); print({})", 30, S.OK),
        ("print({}, flush=True); x = [0] * 10**12", 30, S.MEMORY),
        ("import os\nprint({}, flush=True)\nos._exit(0x52540000)", 30, S.OK),
        ("print({}, flush=True)\nwhile True: print('x' * 1000)", 30, S.OUTPUT_LIMIT),
        (
            "import threading, time; print({}); threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
            30,
            S.OK,
        ),
    ]
    gate = asyncio.Semaphore(50)

    async def call(index: int) -> None:
        code, timeout_s, status = kinds[0 if index % 3 else (index // 3) % len(kinds)]
        async with gate:
            result = await sandbox.execute(code.format(index), timeout_s)
        assert result.status is status, result
        assert result.stdout.startswith(f"{index}\n") or status is S.TIMEOUT, result

    await asyncio.gather(*(call(index) for index in range(runs // 10)))
    memory, descriptors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count_descriptors()
    await asyncio.gather(*(call(index) for index in range(runs)))
    await until(lambda: count_descriptors() <= descriptors + 8)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert len(descendants(sandbox.zygote_pid or 0)) <= 2 * sandbox.workers
    return grown, count_descriptors() - descriptors


async def random_numbers(sandbox: LocalSandbox) -> list[str]:
    code = "import os, random, uuid; print(random.random(), uuid.uuid4(), os.urandom(4).hex())"
    return [(await sandbox.execute(code, 30)).stdout for _ in range(6)]


# -- sessions ----------------------------------------------------------------------------------------------------------


async def session_state(sandbox: LocalSandbox) -> None:
    async def cell(code: str, session: str = "a", timeout_s: float = 30) -> Any:
        return await sandbox.execute(code, timeout_s, session=session)

    assert (await cell("x = 41\nopen('kept', 'w').write('k')\nimport os\nos.environ['K'] = '1'")).status is S.OK
    assert (await cell("x + 1")).stdout == "42\n"
    assert (await cell("open('kept').read(), os.environ['K']")).stdout == "('k', '1')\n"
    other = await cell("x", "b")
    assert (other.status, "NameError" in other.stderr) == (S.ERROR, True)
    assert (await cell("import os; os.listdir('.'), 'K' in os.environ", "b")).stdout == "([], False)\n"
    assert "NameError" in (await sandbox.execute("x", 30)).stderr
    # An exception leaves the state, an exit or a deadline ends the interpreter: the next cell has a fresh one.
    assert (await cell("y = 1; 1 / 0")).status is S.ERROR
    assert (await cell("x, y")).stdout == "(41, 1)\n"
    late = await cell("while True: pass", timeout_s=0.3)
    assert (late.status, late.exit_code) == (S.TIMEOUT, None)
    assert "NameError" in (await cell("x")).stderr
    await cell("x = 5")
    ended = await cell("import os; os._exit(3)")
    assert (ended.status, ended.exit_code) == (S.ERROR, 3)
    assert "NameError" in (await cell("x")).stderr
    stays = await cell("z = 7; raise SystemExit(4)")
    assert (stays.status, stays.exit_code) == (S.ERROR, 4)
    forged = await cell("import os; os._exit(0x52540100)")
    assert forged.status in (S.OK, S.INFRA), forged
    sandbox.release("a")
    assert "NameError" in (await cell("z")).stderr
    for name in "ab":
        sandbox.release(name)
    await _right(sandbox)


async def session_order(sandbox: LocalSandbox) -> str:
    """Calls of one session at the same time come one after another."""
    await sandbox.execute("import time\nlog = []", 30, session="s")
    cell = "log.append('<{0}'); time.sleep(.02); log.append('{0}>')"
    await asyncio.gather(*(sandbox.execute(cell.format(n), 30, session="s") for n in range(8)))
    found = (await sandbox.execute("print(''.join(log))", 30, session="s")).stdout
    sandbox.release("s")
    return found


async def many_sessions(sandbox: LocalSandbox, sessions: int) -> None:

    async def one(index: int) -> None:
        for step in range(3):
            code = f"x = {index}" if step == 0 else f"x += 1000; print({index}, x)"
            result = await sandbox.execute(code, 60, session=f"s{index}")
            assert result.stdout == ("" if step == 0 else f"{index} {index + 1000 * step}\n"), result

    await asyncio.gather(*(one(index) for index in range(sessions)))
    for index in range(0, sessions, 2):
        sandbox.release(f"s{index}")
    await _right(sandbox)
    assert (await sandbox.execute("print(x)", 30, session="s1")).stdout == "2001\n"
    for index in range(sessions):
        sandbox.release(f"s{index}")
    await _as_before(sandbox)


async def sessions_left_open(sandbox: LocalSandbox) -> None:
    """The sandbox is closed while sessions wait and one of them runs."""
    for index in range(5):
        await sandbox.execute("import subprocess, time; x = 1", 30, session=f"s{index}")
    call = asyncio.ensure_future(sandbox.execute(SLEEP, 1000, session="s0"))
    await until(lambda: sandbox.running == 1)
    await sandbox.close()
    assert (await call).status is S.INFRA


async def session_idle(sandbox: LocalSandbox) -> None:
    """An interpreter that waited for too long is ended, with its slot; the next cell has a fresh one."""
    for index in range(4):
        await sandbox.execute("x = 1", 30, session=f"s{index}")
    for _ in range(100):
        await asyncio.sleep(0.3)  # longer than it may idle
        found = (await sandbox.execute("x", 30, session="s0")).stderr
        if found:
            break
    assert "NameError" in found
    sandbox.release("s0")
    await _right(sandbox)
    await _as_before(sandbox)


async def session_fetch(sandbox: LocalSandbox) -> list[Any]:
    await sandbox.execute("open('a.txt', 'w').write('one')", 30, session="s")
    await sandbox.execute("open('a.txt', 'a').write(' two')", 30, session="s")
    ended = await sandbox.end_session("s", ("a.txt", "none"))
    fresh = await sandbox.execute("import os; os.listdir('.')", 30, session="s")
    nothing = await sandbox.end_session("unknown", ("a",))
    sandbox.release("s")
    await _right(sandbox)
    files = {name: data.decode() for name, data in ended.files.items()}
    return [files, list(ended.not_fetched), fresh.stdout, dict(nothing.not_fetched)]


async def session_loses_zygote(sandbox: LocalSandbox) -> list[str]:
    """Its state is lost: INFRA until it is released."""
    await sandbox.execute("x = 1", 30, session="s")
    os.kill(sandbox.zygote_pid or 0, signal.SIGKILL)
    await until(lambda: sandbox.zygote_pid is None)
    found = [str((await sandbox.execute("x", 30, session="s")).status) for _ in range(2)]
    sandbox.release("s")
    found.append((await sandbox.execute("x = 2; x", 30, session="s")).stdout.strip())
    sandbox.release("s")
    return found


# -- files -------------------------------------------------------------------------------------------------------------

_SWAP = """
import os, threading, time
def swap():
    while True:
        for make in (lambda: open('t', 'w').write('mine'), lambda: os.symlink('/etc/hostname', 't')):
            try:
                make()
                os.rename('t', 'f')
            except OSError: pass
try: child = os.fork()
except OSError:
    threading.Thread(target=swap, daemon=True).start()
    child = 1
if child == 0:
    os.setsid()
    swap()
time.sleep(.02)
"""


async def swapped(sandbox: LocalSandbox, times: int) -> list[str]:
    """All that was brought, and the reasons where nothing was."""
    found = set()
    for _ in range(times):
        one = await sandbox.run(ExecutionRequest(_SWAP, 30, fetch=("f",)))
        found |= {data.decode() for data in one.files.values()} | set(one.not_fetched.values())
    return sorted(found)
