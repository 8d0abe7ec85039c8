"""Processes that die, siblings, and many runs, in every tier."""

from __future__ import annotations

import pytest
from tiers import Worker


def test_siblings(worker: Worker) -> None:
    assert worker.call("siblings") == ["[]\n", ""]


@pytest.mark.parametrize("retries", [0, 1])
def test_zygote_killed(worker: Worker, retries: int) -> None:
    found = worker.call("zygote_killed", {"workers": 4, "retries": retries}, runs=20, victim="zygote")
    assert found.count("ok") == (20 if retries else 16), found


def test_launcher_killed(worker: Worker) -> None:
    found = worker.call("zygote_killed", {"workers": 3, "retries": 1}, runs=8, victim="launcher")
    assert set(found) == {"ok"}


@pytest.mark.parametrize("retries", [0, 2])
def test_keeper_killed(worker: Worker, retries: int) -> None:
    found = worker.call("keeper_killed", {"workers": 3, "retries": retries}, runs=6)
    assert set(found) == ({"ok"} if retries else {"ok", "infra"}), found


def test_slow_end(worker: Worker) -> None:
    status, _ = worker.call("slow_end", {"workers": 2})
    assert status == "timeout"


def test_cancelled(worker: Worker) -> None:
    worker.call("cancelled", {"workers": 3})


def test_mixed(worker: Worker) -> None:
    runs = 1500 if worker.tier == "full" else 400
    grown_kb, descriptors = worker.call(
        "mixed", {"workers": 6, "memory_mb": 256, "output_kb": 8}, patience_s=120, runs=runs
    )
    assert grown_kb < 8 << 10
    assert descriptors <= 8


def test_random_numbers(worker: Worker) -> None:
    lines = [line.split() for line in worker.call("random_numbers")]
    assert all(len(set(column)) == len(lines) for column in zip(*lines, strict=True))
