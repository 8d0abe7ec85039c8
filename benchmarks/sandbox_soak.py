"""Whether the sandbox loses a run, or grows: many mixed executions, some of them hostile, with every answer checked.

    python benchmarks/sandbox_soak.py [--runs 10000] [--hostile 0.05] [--clients 64]
    python benchmarks/sandbox_soak.py --clients 1000 --runs 20000 --http
    python benchmarks/sandbox_soak.py --kill-every 10 --seconds 120

Each run carries a number of its own and must bring it back; each program has one right ending. Memory, descriptors,
processes and control groups are looked at while it goes on, and after the sandbox is closed. Exit code 1 where an
answer was lost or wrong, or something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from retool.config import SandboxConfig
from retool.protocols import Sandbox
from retool.sandbox import LocalSandbox
from retool.sandbox.bench import opened
from retool.types import ExecutionResult, ExecutionStatus

S = ExecutionStatus
TIMEOUT_S = 30.0
SHORT_S = 0.3

HONEST: list[tuple[str, ExecutionStatus]] = [
    ("print({n})", S.OK),
    ("import math; print(math.comb(30, 7) * 0 + {n})", S.OK),
    ("from sympy import *\nx = symbols('x')\nprint({n} if solve(x**2 - 4, x) == [-2, 2] else 'no')", S.OK),
    ("import numpy as np\nprint(int(np.arange(10).sum()) - 45 + {n})", S.OK),
    ("print({n})\nraise ValueError('x')", S.ERROR),
    ("open('a', 'w').write('x' * 1000)\nprint({n})", S.OK),
    ("import threading\nt = threading.Thread(target=print, args=({n},)); t.start(); t.join()", S.OK),
    ("print({n})\nimport no_such_module", S.ERROR),
]
HOSTILE: list[tuple[str, ExecutionStatus]] = [
    ("print({n}, flush=True)\nwhile True: pass", S.TIMEOUT),
    ("print({n}, flush=True)\nx = [0] * 10**11", S.MEMORY),
    ("print({n}, flush=True)\nwhile True: print('x' * 1000)", S.OUTPUT_LIMIT),
    ("print({n}, flush=True)\nimport os\nos.kill(os.getpid(), 9)", S.KILLED),
    ("print({n}, flush=True)\nimport os\nos.closerange(0, 256)", S.OK),
    ("print({n}, flush=True)\nimport os, time\nfor _ in 'abc':\n  if not os.fork(): os.setsid(); time.sleep(99)", S.OK),
    ("print({n}, flush=True)\nimport os\ntry:\n  while True: os.fork()\nexcept OSError: os._exit(3)", S.ERROR),
    ("print({n}, flush=True)\nimport os\ntry:\n  for i in range(10**6): open(str(i), 'w')\nexcept OSError: pass", S.OK),
    ("print({n}, flush=True)\nimport os\nos.kill(-1, 9)", S.ERROR),
    ("print({n}, flush=True)\nimport os\nos._exit(0x52540000)", S.OK),
]  # fmt: skip


@dataclass
class Found:
    statuses: Counter[str] = field(default_factory=Counter)
    infra: int = 0
    wrong: list[str] = field(default_factory=list)
    done: int = 0


def check(number: int, expected: ExecutionStatus, result: ExecutionResult, found: Found) -> None:
    found.done += 1
    found.statuses[result.status.value] += 1
    if result.status is S.INFRA:
        found.infra += 1
        return
    first = result.stdout.split("\n", 1)[0]
    if result.status is not expected or first != str(number):
        ending = f"{expected.value} expected, {result.status.value}, printed {first[:50]!r}, {result.stderr[-200:]!r}"
        found.wrong.append(f"run {number}: {ending}")


async def client(sandbox: Sandbox, numbers: list[int], until: float, hostile: float, found: Found) -> None:
    while numbers and time.monotonic() < until:
        number = numbers.pop()
        dice = random.Random(number)
        code, expected = dice.choice(HOSTILE if dice.random() < hostile else HONEST)
        timeout_s = SHORT_S if expected is S.TIMEOUT else TIMEOUT_S
        result = await sandbox.execute(code.replace("{n}", str(number)), timeout_s)
        check(number, expected, result, found)


def resident_kb(pid: int) -> int:
    """Proportional share (PSS): pages that several processes hold are counted once."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def descendants(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(word) for word in file.read().split()]
    except OSError:
        return []
    return [process for child in children for process in (child, *descendants(child))]


def cgroups() -> int:
    return len(glob.glob("/sys/fs/cgroup/**/retool-*", recursive=True))


def state(found: Found, begin: float) -> str:
    below = descendants(os.getpid())
    megabytes = sum(map(resident_kb, [os.getpid(), *below])) / 1024
    seconds = time.monotonic() - begin
    return (
        f"{seconds:6.0f} s  {found.done:7} runs  {found.done / seconds:5.0f} a second  "
        f"{megabytes:6.0f} MB  {len(below):3} processes  {len(os.listdir('/proc/self/fd')):4} descriptors  "
        f"{found.infra} infra  {len(found.wrong)} wrong"
    )


async def watch(found: Found, begin: float, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        print(state(found, begin), flush=True)


async def kill_zygotes(sandbox: LocalSandbox, every_s: float, kills: list[float]) -> None:
    while True:
        await asyncio.sleep(every_s)
        pid = sandbox.zygote_pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            kills.append(time.monotonic())


async def soak(arguments: argparse.Namespace) -> int:
    found, kills = Found(), [0.0][:0]
    before = cgroups(), len(descendants(os.getpid()))
    numbers = list(range(arguments.runs))
    async with opened(SandboxConfig(memory_mb=512), arguments.http) as sandbox:
        begin = time.monotonic()
        helpers = [asyncio.ensure_future(watch(found, begin, arguments.every))]
        if arguments.kill_every:
            if not isinstance(sandbox, LocalSandbox):
                raise SystemExit("--kill-every needs the embedded sandbox: leave --http out")
            helpers.append(asyncio.ensure_future(kill_zygotes(sandbox, arguments.kill_every, kills)))
        until = begin + arguments.seconds if arguments.seconds else float("inf")
        await asyncio.gather(
            *(client(sandbox, numbers, until, arguments.hostile, found) for _ in range(arguments.clients))
        )
        for helper in helpers:
            helper.cancel()
        print(state(found, begin))
    lost = arguments.runs - len(numbers) - found.done
    left = cgroups() - before[0], len(descendants(os.getpid())) - before[1]
    print(f"statuses {dict(sorted(found.statuses.items()))}")
    print(f"zygotes killed {len(kills)}; lost {lost}; infra {found.infra}; wrong {len(found.wrong)}")
    print(f"left behind: {left[0]} control groups, {left[1]} processes")
    for line in found.wrong[:20]:
        print(line)
    return int(bool(found.wrong or lost or max(left) > 0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile programs")
    parser.add_argument("--clients", type=int, default=64, help="callers at a time")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop then; 0: when all runs are done")
    parser.add_argument("--kill-every", type=float, default=0.0, help="kill the zygote so often, in seconds")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two lines")
    parser.add_argument("--http", action="store_true", help="through a service in a process of its own")
    sys.exit(asyncio.run(soak(parser.parse_args())))
