"""What the service measures of itself, in Prometheus' text format. docs/sandbox_service.md lists the names."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from retool.types import ExecutionStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""From one ``print`` in a warm interpreter to the longest run that is allowed by default."""


class Meters:
    """One service's, in a registry of its own, so that two services may live in one process."""

    def __init__(self, queue_length: Callable[[], float], running: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        waiting = Gauge("retool_sandbox_queue_length", "Runs that wait in line.", registry=self._registry)
        waiting.set_function(queue_length)
        now = Gauge("retool_sandbox_running", "Runs that have a worker.", registry=self._registry)
        now.set_function(running)
        self._tier = Gauge("retool_sandbox_tier", "1 for the isolation's tier.", ["tier"], registry=self._registry)
        self._workers = Gauge("retool_sandbox_workers", "Runs that may run at a time.", registry=self._registry)
        self._requests = Counter(
            "retool_sandbox_requests",
            "Answered requests by how their code ended.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "retool_sandbox_request_seconds",
            "From a request's head to its answer, the line included.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._infra = Counter(
            "retool_sandbox_infra_faults", "Requests that the sandbox itself failed.", registry=self._registry
        )
        self._rejected = Counter(
            "retool_sandbox_rejected", "Requests that ran nothing, by reason.", ["reason"], registry=self._registry
        )
        self._abandoned = Counter(
            "retool_sandbox_abandoned", "Requests whose client went away.", registry=self._registry
        )

    def started(self, tier: str, workers: int) -> None:
        self._tier.labels(tier).set(1)
        self._workers.set(workers)

    def answered(self, endpoint: str, status: ExecutionStatus, seconds: float) -> None:
        self._requests.labels(endpoint, status.value).inc()
        self._seconds.labels(endpoint).observe(seconds)
        if status is ExecutionStatus.INFRA:
            self._infra.inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def abandoned(self) -> None:
        self._abandoned.inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)
