"""How fast a sandbox answers: ``retool sandbox bench``."""

from __future__ import annotations

import asyncio
import itertools
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.protocols import Sandbox
from retool.sandbox.pool import LocalSandbox
from retool.types import ExecutionStatus

WORKLOADS: dict[str, tuple[tuple[str, ExecutionStatus], ...]] = {
    "print": (("print(1+1)", ExecutionStatus.OK),),
    "sympy": (("from sympy import factorint\nprint(factorint(2**67-1))", ExecutionStatus.OK),),
    "mixed": (
        ("print(1+1)", ExecutionStatus.OK),
        ("from sympy import factorint\nprint(factorint(2**67-1))", ExecutionStatus.OK),
        ("from sympy import symbols, solve\nx = symbols('x')\nsolve(x**2 - 5*x + 6, x)", ExecutionStatus.OK),
        ("import numpy as np\nprint(np.linalg.det(np.arange(9.0).reshape(3, 3) + np.eye(3)))", ExecutionStatus.OK),
        ("print(sum(i * i for i in range(20000)))", ExecutionStatus.OK),
        ("print(1/0)", ExecutionStatus.ERROR),
        ("print('x' * 20000)", ExecutionStatus.OK),
        ("import no_such_module", ExecutionStatus.ERROR),
    ),
}
"""Programs by workload, each with how it must end. That sympy is warmed means here that the zygote has factored this
very number once, so that sympy's own cache holds it; a number of that size that it has not seen takes 25 to 40 ms."""
TIMEOUT_S = 60.0
START_S = 120.0
_ADDRESS = re.compile(r"http://[\w.:\[\]-]+")


@dataclass(frozen=True)
class Measured:
    workload: str
    concurrency: int
    requests: int
    http: bool
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    statuses: dict[str, int]
    wrong: int
    """Answers with another status than the program must have."""
    tier: str


async def measure(sandbox: Sandbox, workload: str, concurrency: int, requests: int, *, http: bool = False) -> Measured:
    """Send the workload's programs in turn, ``concurrency`` at a time."""
    programs = WORKLOADS[workload]
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    tiers: set[str] = set()
    wrong = 0
    todo: Iterator[tuple[str, ExecutionStatus]] = itertools.islice(itertools.cycle(programs), requests)

    async def client() -> None:
        nonlocal wrong
        for code, expected in todo:
            begin = time.perf_counter()
            result = await sandbox.execute(code, TIMEOUT_S)
            latencies.append(time.perf_counter() - begin)
            statuses[result.status.value] += 1
            tiers.add(result.tier)
            wrong += result.status is not expected

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - begin
    return Measured(
        workload,
        concurrency,
        requests,
        http,
        requests / seconds,
        1e3 * statistics.median(latencies),
        1e3 * percentile(latencies, 0.99),
        dict(statuses),
        wrong,
        "/".join(sorted(tiers - {""})),
    )


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@asynccontextmanager
async def opened(config: SandboxConfig, http: bool) -> AsyncIterator[Sandbox]:
    """A warmed-up sandbox: embedded, or behind a service in a process of its own."""
    if not http:
        async with LocalSandbox(config) as sandbox:
            yield sandbox
        return
    from retool.sandbox.client import RemoteSandbox

    command = [sys.executable, "-m", "retool.cli", "sandbox", "serve", "--port", "0", "--tier", config.tier]
    if config.workers:
        command += ["--workers", str(config.workers)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = await asyncio.wait_for(asyncio.to_thread(server.stdout.readline), START_S)
        address = _ADDRESS.search(said)
        if address is None:
            raise SandboxBroken(f"the service did not start: it said {said.strip()!r}")
        remote = RemoteSandbox(config.model_copy(update={"url": address[0], "concurrency": 4096}))
        try:
            yield remote
        finally:
            await remote.close()
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait)


async def bench(config: SandboxConfig, workload: str, concurrency: int, requests: int, http: bool) -> Measured:
    async with opened(config, http) as sandbox:
        warm_up = min(requests, 2 * concurrency)
        await measure(sandbox, workload, concurrency, warm_up, http=http)
        return await measure(sandbox, workload, concurrency, requests, http=http)
