"""The bench's own arithmetic and honesty, with a scripted sandbox; and the command, end to end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from retool.sandbox.bench import WORKLOADS, Measured, measure, percentile
from retool.types import ExecutionResult, ExecutionStatus


class Scripted:
    """Ends every program with one status, and knows how many ran at a time."""

    def __init__(self, status: ExecutionStatus) -> None:
        self.status = status
        self.running = self.most = 0

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        return ExecutionResult(self.status, tier="userns")

    def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


def measured(status: ExecutionStatus, workload: str, concurrency: int, requests: int) -> tuple[Scripted, Measured]:
    sandbox = Scripted(status)
    return sandbox, asyncio.run(measure(sandbox, workload, concurrency, requests))


@pytest.mark.parametrize(("concurrency", "requests"), [(1, 5), (4, 50), (64, 10)])
def test_every_request_is_sent_once_and_at_most_so_many_at_a_time(concurrency: int, requests: int) -> None:
    sandbox, found = measured(ExecutionStatus.OK, "print", concurrency, requests)
    assert (found.statuses, found.wrong, found.tier) == ({"ok": requests}, 0, "userns")
    assert sandbox.most <= concurrency
    assert found.requests_per_second > 0 and found.p50_ms <= found.p99_ms


def test_a_wrong_ending_is_not_a_fast_one() -> None:
    _, found = measured(ExecutionStatus.OK, "mixed", 2, len(WORKLOADS["mixed"]) * 2)
    assert found.wrong == 2 * sum(expected is not ExecutionStatus.OK for _, expected in WORKLOADS["mixed"])
    _, found = measured(ExecutionStatus.INFRA, "print", 2, 6)
    assert (found.wrong, found.statuses) == (6, {"infra": 6})


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_percentile(share: float, value: float) -> None:
    assert percentile([float(i) for i in range(100, 0, -1)], share) == value


@pytest.mark.parametrize("how", [[], ["--http"]])
def test_the_command(how: list[str]) -> None:
    command = [sys.executable, "-m", "retool.cli", "sandbox", "bench", "--workload", "mixed", "--concurrency", "4"]
    done = subprocess.run(
        [*command, "--requests", "16", "--workers", "2", "--json", *how], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"requests_per_second", "p50_ms", "p99_ms", "statuses", "tier"} <= set(found)
    assert found["statuses"] == {"ok": 12, "error": 4}
    assert (found["wrong"], found["http"]) == (0, bool(how))
    assert found["tier"] in ("full", "userns", "restricted")
