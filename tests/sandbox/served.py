"""A scripted sandbox behind the real HTTP service, and a client to ask it with."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from retool.config import SandboxConfig
from retool.sandbox.serve import Listener, bind, listen
from retool.sandbox.server import ServedSandbox, ServerConfig
from retool.sandbox.tier import SandboxInfo
from retool.types import Execution, ExecutionRequest, ExecutionResult, ExecutionStatus
from tests.fakes import hear_ctrl_c

Script = Callable[[ExecutionRequest], ExecutionResult | Execution | BaseException]


class ServedFake:
    """Has the face of ``LocalSandbox``. ``script`` answers a run, or is raised; ``held`` keeps runs waiting until the
    event is set, or until they are cancelled or the sandbox is closed."""

    def __init__(self, script: Script | None = None, *, held: bool = False) -> None:
        self._script = script or (lambda request: done(f"ran {request.code}"))
        self.held = held
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.requests: list[ExecutionRequest] = []
        self.released: list[str] = []
        self.ended: list[tuple[str, tuple[str, ...]]] = []
        self.files: dict[str, bytes] = {}
        self.cancelled = 0
        self.closed = False
        self.waiting = 0
        self.running = 0
        self.workers = 3
        self.info: SandboxInfo | None = None

    async def start(self) -> SandboxInfo:
        self.info = some_info()
        return self.info

    async def run(self, request: ExecutionRequest) -> Execution:
        self.requests.append(request)
        self.running += 1
        self.begun.set()
        try:
            if self.held:
                await self.go.wait()
            if self.closed:
                return Execution(infra_result("the sandbox was closed"))
            answer = self._script(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, Execution) else Execution(answer)

    async def end_session(self, session: str, fetch: tuple[str, ...] = ()) -> Execution:
        self.ended.append((session, fetch))
        there = {name: self.files[name] for name in fetch if name in self.files}
        return Execution(done(""), there, {name: "no such file" for name in fetch if name not in there})

    def release(self, session: str) -> None:
        self.released.append(session)

    async def close(self) -> None:
        self.closed = True
        self.go.set()


def done(stdout: str) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.OK, stdout, exit_code=0, duration_s=0.25, tier="userns")


def infra_result(reason: str) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.INFRA, stderr=reason)


def some_info() -> SandboxInfo:
    return SandboxInfo("userns", ("seccomp", "rlimits"), "3.11.7", ())


@dataclass
class Reply:
    status: int
    data: Any
    headers: dict[str, str]


@dataclass
class Asker:
    """One client of one service."""

    url: str
    http: aiohttp.ClientSession
    listener: Listener

    async def post(self, path: str, body: Any, **options: Any) -> Reply:
        """``body`` as JSON, or as it is where it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        async with self.http.post(self.url + path, data=data, headers=headers, **options) as response:
            return Reply(response.status, await response.json(), dict(response.headers))

    async def run(self, code: str = "print(1)", **fields: Any) -> Reply:
        return await self.post("/run_code", {"code": code, "language": "python"} | fields)

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        async with self.http.get(self.url + path, **options) as response:
            return response.status, await response.text()


@asynccontextmanager
async def service(sandbox: ServedSandbox, limits: SandboxConfig | None = None, **settings: Any) -> AsyncIterator[Asker]:
    config = ServerConfig(limits or SandboxConfig(), port=0, **settings)
    sock = bind(config)
    try:
        await sandbox.start()
        listener = await listen(sandbox, config, sock)
        try:
            async with aiohttp.ClientSession() as http:
                yield Asker(f"http://127.0.0.1:{listener.port}", http, listener)
        finally:
            await listener.close()
    finally:
        sock.close()
        await sandbox.close()


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``retool sandbox serve`` in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "retool.cli", "sandbox", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("retool sandbox: http://"), (line, process.stderr.read())
        yield process, line.split()[2].rstrip(",;")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
