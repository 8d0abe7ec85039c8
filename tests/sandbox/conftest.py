"""Every sandbox of these tests is real, and is searched for leftovers when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from leftovers import PRELOAD, InSandbox, SharedSandboxes, folder_of, identify, nothing_since, snapshot
from tiers import CONDITIONS, SkippedCondition, Worker

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, ExecutionStatus

Scenario = Callable[[LocalSandbox], Awaitable[Any]]


@pytest.fixture
def in_sandbox() -> InSandbox:
    """``in_sandbox(scenario, **config)``: run an async scenario with a sandbox, close it, and assert that nothing is
    left: no process, folder, control group, mount or descriptor."""

    def run(scenario: Scenario, **config: Any) -> Any:
        async def whole() -> Any:
            before = snapshot()
            sandbox = LocalSandbox(SandboxConfig(**({"workers": 3, "preload": PRELOAD} | config)))
            mark = folder = ""
            try:
                mark, folder = await identify(sandbox), folder_of(sandbox)
                answer = await scenario(sandbox)
                after = await sandbox.execute("print('still', 'here')", 30)
                assert (after.status, after.stdout) == (ExecutionStatus.OK, "still here\n")
            finally:
                await sandbox.close()
            await nothing_since(before, mark, folder)
            return answer

        return asyncio.run(whole())

    return run


@pytest.fixture(scope="module")
def execute() -> Iterator[Callable[..., ExecutionResult]]:
    """``execute(code, timeout_s, **config)``: one program in a sandbox that the file's tests share."""
    sandboxes = SharedSandboxes()
    yield sandboxes.execute
    sandboxes.close()


@pytest.fixture(scope="module", params=CONDITIONS)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A process under one of the conditions, which the file's tests share."""
    try:
        made = Worker(request.param)
    except SkippedCondition as reason:
        pytest.skip(str(reason))
    yield made
    made.close()
