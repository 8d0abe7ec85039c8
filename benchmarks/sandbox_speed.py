"""How fast the sandbox answers: requests a second, p50 and p99 at concurrency 1, 8 and 64, for ``print`` and for sympy.

    python benchmarks/sandbox_speed.py [--rounds 3] [--requests 200] [--cold 5]

Absolute figures depend on what else the machine does. So between two measurements the same program is run a few times
by a fresh ``python -I -c``, one after another, and every line ends in ratios to that: how many times as many requests a
second, and how many times shorter the median wait (which at concurrency 64 is mostly waiting in line).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.sandbox.bench import percentile
from retool.types import ExecutionStatus

PROGRAMS = {
    "print": ("print(1+1)", "2\n", 1),
    "sympy": (
        "from sympy import symbols, solve, factorint\nx = symbols('x')\n"
        "print(solve(x**2 - 5*x + 6, x), factorint(5040))",
        "[2, 3] {2: 4, 3: 2, 5: 1, 7: 1}\n",
        10,
    ),
}
"""Name: source, what it prints, and by how many times fewer requests it is measured."""
CONCURRENCY = (1, 8, 64)
TIMEOUT_S = 60.0


async def measure(sandbox: LocalSandbox, code: str, stdout: str, requests: int, concurrency: int) -> list[float]:
    """Seconds that each request took, then the seconds for all of them."""
    waits: list[float] = []
    todo = iter(range(requests))

    async def client() -> None:
        for _ in todo:
            begin = time.perf_counter()
            result = await sandbox.execute(code, TIMEOUT_S)
            waits.append(time.perf_counter() - begin)
            if result.status is not ExecutionStatus.OK or result.stdout != stdout:
                raise SystemExit(f"wrong answer: {result}")

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [*waits, time.perf_counter() - begin]


def cold(code: str, stdout: str, count: int) -> list[float]:
    """Seconds that each of ``count`` fresh interpreters took."""
    waits = []
    for _ in range(count):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
        waits.append(time.perf_counter() - begin)
        if done.stdout != stdout:
            raise SystemExit(f"wrong answer: {done.stdout!r}")
    return waits


async def main(arguments: argparse.Namespace) -> None:
    config = SandboxConfig(preload=["math", "random", "itertools", "fractions", "decimal", "numpy", "sympy"])
    begin = time.perf_counter()
    async with LocalSandbox(config) as sandbox:
        print(f"start {time.perf_counter() - begin:.2f} s; {sandbox.info}")
        print(f"{'program':8} {'c':>3} {'per s':>8} {'p50 ms':>8} {'p99 ms':>8} {'x rate':>8} {'x p50':>8}")
        for name, (code, stdout, fewer) in PROGRAMS.items():
            waits: dict[int, list[float]] = {c: [] for c in CONCURRENCY}
            seconds = dict.fromkeys(CONCURRENCY, 0.0)
            fresh: list[float] = []
            for _ in range(arguments.rounds):
                for concurrency in CONCURRENCY:
                    requests = max(arguments.requests // fewer, concurrency)
                    *each, whole = await measure(sandbox, code, stdout, requests, concurrency)
                    waits[concurrency] += each
                    seconds[concurrency] += whole
                    fresh += await asyncio.to_thread(cold, code, stdout, arguments.cold)
            base = statistics.median(fresh)
            print(f"{name:8} {'cold':>3} {1 / statistics.mean(fresh):8.1f} {base * 1e3:8.2f} "
                  f"{percentile(fresh, 0.99) * 1e3:8.2f} {1:8.1f} {1:8.1f}")  # fmt: skip
            for concurrency in CONCURRENCY:
                each = waits[concurrency]
                rate, p50 = len(each) / seconds[concurrency], statistics.median(each)
                print(f"{name:8} {concurrency:4} {rate:8.1f} {p50 * 1e3:8.2f} {percentile(each, 0.99) * 1e3:8.2f} "
                      f"{rate * statistics.mean(fresh):8.1f} {base / p50:8.1f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often all measurements take turns")
    parser.add_argument("--requests", type=int, default=200, help="requests a measurement (a tenth for sympy)")
    parser.add_argument("--cold", type=int, default=5, help="fresh interpreters between two measurements")
    asyncio.run(main(parser.parse_args()))
