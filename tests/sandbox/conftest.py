"""Every sandbox of these tests is real, and is searched for leftovers when it is closed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from leftovers import InSandbox, SharedSandboxes, identify, marked_processes

from retool.config import SandboxConfig
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, ExecutionStatus

Scenario = Callable[[LocalSandbox], Awaitable[Any]]


@pytest.fixture
def in_sandbox() -> InSandbox:
    """``in_sandbox(scenario, **config)``: run an async scenario with a sandbox, close it, and assert that nothing is
    left: no process, no folder, no descriptor."""

    def run(scenario: Scenario, **config: Any) -> Any:
        async def whole() -> Any:
            descriptors = set(os.listdir("/proc/self/fd"))
            sandbox = LocalSandbox(SandboxConfig(**({"workers": 3} | config)))
            try:
                mark, folder = await identify(sandbox)
                answer = await scenario(sandbox)
                after = await sandbox.execute("print('still', 'here')", 30)
                assert (after.status, after.stdout) == (ExecutionStatus.OK, "still here\n")
            finally:
                await sandbox.close()
            assert not os.path.exists(folder)
            assert marked_processes(mark) == []
            assert set(os.listdir("/proc/self/fd")) == descriptors
            return answer

        return asyncio.run(whole())

    return run


@pytest.fixture(scope="module")
def execute() -> Iterator[Callable[..., ExecutionResult]]:
    """``execute(code, timeout_s, **config)``: one program in a sandbox that the file's tests share."""
    sandboxes = SharedSandboxes()
    yield sandboxes.execute
    sandboxes.close()
