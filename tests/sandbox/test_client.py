"""``RemoteSandbox`` against our own service, and against one that answers as others do."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from served import ServedFake, done, infra_result, service

from retool.config import SandboxConfig
from retool.errors import SandboxBroken, SandboxRefused
from retool.sandbox.choose import open_sandbox
from retool.sandbox.client import RemoteSandbox
from retool.types import ExecutionResult, ExecutionStatus

Answer = dict[str, Any] | web.Response | Callable[[dict[str, Any]], Awaitable[web.Response]]


class OtherService:
    """A service with a script: one answer a request, the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if callable(answer):
                return await answer(self.requests[-1])
            if isinstance(answer, web.Response):
                return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
            return web.json_response(answer)
        finally:
            self.now -= 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.post("/run_code", self.handle), web.get("/v1/ping", pong)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await web.SockSite(runner, sock).start()
            try:
                yield f"http://127.0.0.1:{sock.getsockname()[1]}"
            finally:
                await runner.cleanup()


async def pong(request: web.Request) -> web.Response:
    return web.json_response("pong")


class Sleeper:
    """In place of ``asyncio.sleep``."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def fusion(
    status: str, return_code: int | None, *, stdout: str = "", stderr: str = "", top: str = ""
) -> dict[str, Any]:
    """As SandboxFusion answers: none of our own fields."""
    run = {"status": status, "execution_time": 0.5, "return_code": return_code, "stdout": stdout, "stderr": stderr}
    top = top or ("Success" if return_code == 0 else "Failed")
    return {
        "status": top,
        "message": "",
        "compile_result": None,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
    }


def ask(
    other: OtherService, *, sleeper: Sleeper | None = None, session: str = "", line_s: float = 60, **config: Any
) -> Any:
    async def whole() -> ExecutionResult:
        async with (
            other.open() as url,
            RemoteSandbox(SandboxConfig(url=url, **config), sleep=sleeper or Sleeper(), line_s=line_s) as sandbox,
        ):
            return await sandbox.execute("print(1)", 3.0, session=session)

    return asyncio.run(whole())


OWN = [
    ExecutionResult(ExecutionStatus.OK, "é\0\n", "warning", 0, 0.25, False, "full"),
    ExecutionResult(ExecutionStatus.ERROR, "", "Traceback", 7, 0.25, False, "full"),
    ExecutionResult(ExecutionStatus.TIMEOUT, "so far", "", None, 3.0, False, "userns"),
    ExecutionResult(ExecutionStatus.MEMORY, "", "MemoryError", 1, 0.25, False, "userns"),
    ExecutionResult(ExecutionStatus.MEMORY, "", "", -9, 0.25, False, "full"),
    ExecutionResult(ExecutionStatus.OUTPUT_LIMIT, "x" * 1000, "", None, 0.25, True, "full"),
    ExecutionResult(ExecutionStatus.KILLED, "", "", -11, 0.25, False, "restricted"),
]


@pytest.mark.parametrize("result", OWN, ids=lambda r: r.status.value)
def test_nothing_is_lost_through_our_own_service(result: ExecutionResult) -> None:
    async def whole() -> ExecutionResult:
        fake = ServedFake(lambda request: result)
        async with service(fake, token="t") as asker:
            sandbox = await open_sandbox(SandboxConfig(url=asker.url + "/", token="t", memory_mb=77))
            found = await sandbox.execute("code", 3.0)
            await sandbox.close()
        [request] = fake.requests
        assert (request.code, request.timeout_s, request.memory_mb, request.session) == ("code", 3.0, 77, "")
        return found

    assert asyncio.run(whole()) == result


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (fusion("Finished", 0, stdout="1\n"), ExecutionStatus.OK, 0),
        (fusion("Finished", 1, stderr="KeyError: 1\n"), ExecutionStatus.ERROR, 1),
        (fusion("Finished", 1, stderr="Traceback …\nMemoryError\n"), ExecutionStatus.MEMORY, 1),
        (fusion("Finished", 1, stderr="numpy._core._exceptions._ArrayMemoryError: x\n"), ExecutionStatus.MEMORY, 1),
        (fusion("Finished", -9), ExecutionStatus.KILLED, -9),
        (fusion("TimeLimitExceeded", None, stdout="so far"), ExecutionStatus.TIMEOUT, None),
    ],
)
def test_endings_of_sandbox_fusion(answer: dict[str, Any], status: ExecutionStatus, code: int | None) -> None:
    other = OtherService(answer)
    found = ask(other, memory_mb=99)
    assert (found.status, found.exit_code, found.duration_s, found.tier) == (status, code, 0.5, "")
    assert (found.stdout, found.stderr) == (answer["run_result"]["stdout"], answer["run_result"]["stderr"])
    sent = {
        "code": "print(1)",
        "language": "python",
        "compile_timeout": 10.0,
        "run_timeout": 3.0,
        "memory_limit_MB": 99,
    }
    assert other.requests == [sent]
    assert "Authorization" not in other.headers[0]


def test_more_output_than_is_allowed_is_cut_as_a_local_sandbox_does() -> None:
    found = ask(OtherService(fusion("Finished", 0, stdout="é" * 1000, stderr="e")), output_kb=1)
    assert (found.status, found.exit_code, found.truncated) == (ExecutionStatus.OUTPUT_LIMIT, None, True)
    assert (found.stdout, found.stderr) == ("é" * 512, "e")
    found = ask(OtherService(fusion("Finished", 0, stdout="x" * 1024)), output_kb=1)
    assert (found.status, found.truncated) == (ExecutionStatus.OK, False)


def broken(status: int, body: str = "oops", **headers: str) -> web.Response:
    return web.Response(status=status, text=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (fusion("Error", None, stderr="no bash", top="SandboxError") | {"message": "no bash"}, "no bash"),
        (fusion("Error", None, stderr="no bash"), "no bash"),
        ({"status": "Success", "message": "", "run_result": None}, "no run_result"),
        ({"status": "Perfect", "message": ""}, "makes no sense: status"),
        ({"hello": "world"}, "makes no sense: status"),
        (broken(200, "<html>"), "makes no sense: the answer: Invalid JSON"),
        (broken(500), "the service answered 500: oops"),
        (broken(302, Location="http://127.0.0.1:9/"), "cannot connect"),
    ],
)
def test_a_service_that_fails_is_infra_with_the_reason(answer: Answer, says: str) -> None:
    other = OtherService(answer)
    found = ask(other, retries=0)
    assert found.status is ExecutionStatus.INFRA
    assert says in found.stderr
    assert len(other.requests) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_overloaded_service_is_asked_again(status: int) -> None:
    sleeper, other = Sleeper(), OtherService(broken(status), broken(status), fusion("Finished", 0))
    assert ask(other, sleeper=sleeper, retries=2).status is ExecutionStatus.OK
    assert len(other.requests) == 3 and len(sleeper.slept) == 2
    assert 0 <= sleeper.slept[0] <= 0.5 and 0 <= sleeper.slept[1] <= 1
    other = OtherService(broken(status))
    found = ask(other, retries=2)
    assert (found.status, len(other.requests)) == (ExecutionStatus.INFRA, 3)
    assert str(status) in found.stderr


@pytest.mark.parametrize(
    ("header", "least", "most"), [("3", 3, 3.5), ("86400", 10, 10.5), ("Wed, 21 Oct 2026", 0, 0.5)]
)
def test_retry_after_is_honoured_up_to_a_limit(header: str, least: float, most: float) -> None:
    sleeper = Sleeper()
    ask(OtherService(broken(503, Retry_After=header), fusion("Finished", 0)), sleeper=sleeper)
    assert least <= sleeper.slept[0] <= most


def test_a_connection_that_breaks_is_asked_again() -> None:
    async def hang_up(body: dict[str, Any]) -> web.Response:
        raise asyncio.CancelledError

    other = OtherService(hang_up, fusion("Finished", 0))
    assert ask(other, retries=1).status is ExecutionStatus.OK
    found = ask(OtherService(hang_up), retries=1)
    assert found.status is ExecutionStatus.INFRA and "the connection broke" in found.stderr


def test_a_refused_connection_is_infra_and_a_start_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    sleeper = Sleeper()

    async def whole() -> ExecutionResult:
        sandbox = RemoteSandbox(SandboxConfig(url=url, retries=3), sleep=sleeper)
        with pytest.raises(SandboxBroken, match=f"sandbox.url = '{url}': cannot connect"):
            await sandbox.start()
        try:
            return await sandbox.execute("1", 1.0)
        finally:
            await sandbox.close()

    found = asyncio.run(whole())
    assert found.status is ExecutionStatus.INFRA and "cannot connect" in found.stderr
    assert len(sleeper.slept) == 3
    with pytest.raises(SandboxBroken):
        asyncio.run(open_sandbox(SandboxConfig(url=url)))


def test_a_service_that_is_too_slow_is_given_up() -> None:
    async def slow(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    other = OtherService(slow)
    # Compile and overhead are 20 s, the code's own 3: a line of −22.8 s leaves 0.2.
    found = ask(other, line_s=-22.8, retries=3)
    assert found.status is ExecutionStatus.INFRA and "no answer within 0.2 s" in found.stderr
    assert len(other.requests) == 1


@pytest.mark.parametrize(
    ("status", "error"), [(401, SandboxRefused), (403, SandboxRefused), (422, SandboxBroken), (404, SandboxBroken)]
)
def test_a_service_that_does_not_take_our_requests_ends_the_job(status: int, error: type[Exception]) -> None:
    other = OtherService(broken(status, "memory_limit_MB = 9: too much"))
    with pytest.raises(error, match=r"^sandbox\.url = 'http://127"):
        ask(other)
    assert len(other.requests) == 1


def test_no_more_requests_at_a_time_than_allowed() -> None:
    async def whole() -> None:
        async def later(body: dict[str, Any]) -> web.Response:
            await asyncio.sleep(0.01)
            return web.json_response(fusion("Finished", 0, stdout=body["code"]))

        other = OtherService(later)
        async with other.open() as url, RemoteSandbox(SandboxConfig(url=url, concurrency=3)) as sandbox:
            found = await asyncio.gather(*(sandbox.execute(str(n), 1.0) for n in range(20)))
        assert [result.stdout for result in found] == [str(n) for n in range(20)]
        assert other.most == 3

    asyncio.run(whole())


def test_code_that_is_not_text_is_the_programs_error_and_is_not_sent() -> None:
    async def whole() -> ExecutionResult:
        sandbox = RemoteSandbox(SandboxConfig(url="http://127.0.0.1:9"))
        return await sandbox.execute("print('\ud800')", 1.0)

    found = asyncio.run(whole())
    assert (found.status, found.exit_code) == (ExecutionStatus.ERROR, 1)
    assert "surrogates not allowed" in found.stderr


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_makes_no_sense_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        asyncio.run(RemoteSandbox(SandboxConfig(url="http://127.0.0.1:9")).execute("1", timeout_s))


def test_sessions_are_the_clients_own_and_are_ended() -> None:
    async def whole() -> None:
        fake = ServedFake()
        async with service(fake) as asker:
            config = SandboxConfig(url=asker.url)
            async with RemoteSandbox(config) as one, RemoteSandbox(config) as two:
                for sandbox in (one, one, two):
                    await sandbox.execute("1", 1.0, session="7/t/0")
                await one.execute("1", 1.0, session="8/t/0")
                names = [request.session for request in fake.requests]
                assert names[0] == names[1] and len(set(names)) == 3
                one.release("7/t/0")
                one.release("7/t/0")
                one.release("never used")
                async with asyncio.timeout(10):
                    while not fake.released:
                        await asyncio.sleep(0.005)
                assert fake.released == [names[0]]
            assert sorted(fake.released) == sorted(set(names))

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("answer", "asked"),
    [(broken(503), 1), (broken(504), 1), (broken(503, Retry_After="0"), 3), (broken(429, Retry_After="0"), 3)],
)
def test_a_stateful_run_is_sent_again_only_where_nothing_of_it_ran(answer: Answer, asked: int) -> None:
    other = OtherService(answer)
    assert ask(other, session="s", retries=2).status is ExecutionStatus.INFRA
    assert len(other.requests) == asked


def test_closing_ends_what_runs() -> None:
    async def whole() -> tuple[list[ExecutionResult], int]:
        fake = ServedFake(held=True)
        async with service(fake) as asker:
            sandbox = RemoteSandbox(SandboxConfig(url=asker.url, concurrency=1))
            await sandbox.start()
            running = [asyncio.create_task(sandbox.execute("1", 9.0)) for _ in range(2)]
            await fake.begun.wait()
            await sandbox.close()
            found = await asyncio.wait_for(asyncio.gather(*running), 10)
            with pytest.raises(RuntimeError, match="closed"):
                await sandbox.execute("1", 1.0)
            async with asyncio.timeout(10):
                while not fake.cancelled:
                    await asyncio.sleep(0.005)
            return found, len(fake.requests)

    found, asked = asyncio.run(whole())
    assert [result.status for result in found] == [ExecutionStatus.INFRA] * 2
    assert asked == 1


def test_cancelling_kills_the_run() -> None:
    async def whole() -> None:
        fake = ServedFake(held=True)
        async with service(fake) as asker, RemoteSandbox(SandboxConfig(url=asker.url)) as sandbox:
            running = asyncio.create_task(sandbox.execute("1", 9.0))
            await fake.begun.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            async with asyncio.timeout(10):
                while not fake.cancelled:
                    await asyncio.sleep(0.005)

    asyncio.run(whole())


def test_one_event_loop_only() -> None:
    sandbox = RemoteSandbox(SandboxConfig(url="http://127.0.0.1:9", retries=0))
    asyncio.run(sandbox.execute("1", 1.0))
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(sandbox.execute("1", 1.0))
    asyncio.run(sandbox.close())


def test_a_wrong_address_is_found_at_the_start() -> None:
    async def elsewhere(request: web.Request) -> web.Response:
        return web.Response(text="<html>welcome", content_type="text/html")

    async def whole() -> None:
        app = web.Application()
        app.router.add_get("/{any:.*}", elsewhere)
        runner = web.AppRunner(app)
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await web.SockSite(runner, sock).start()
            sandbox = RemoteSandbox(SandboxConfig(url=f"http://127.0.0.1:{sock.getsockname()[1]}"))
            with pytest.raises(SandboxBroken, match="no sandbox answers there"):
                await sandbox.start()
            await sandbox.close()
            await runner.cleanup()

    asyncio.run(whole())


def test_the_config_chooses() -> None:
    async def whole() -> None:
        async with service(ServedFake(lambda request: done("remote"))) as asker:
            sandbox = await open_sandbox(SandboxConfig(url=asker.url))
            try:
                assert (await sandbox.execute("1", 1.0)).stdout == "remote"
            finally:
                await sandbox.close()
        sandbox = await open_sandbox(SandboxConfig(workers=1, preload=[]))
        try:
            assert (await sandbox.execute("print('local')", 20.0)).stdout == "local\n"
        finally:
            await sandbox.close()

    asyncio.run(whole())


def test_our_services_infra_comes_back_as_infra() -> None:
    async def whole() -> ExecutionResult:
        fake = ServedFake(lambda request: infra_result("the zygote died"))
        async with service(fake) as asker:
            sandbox = RemoteSandbox(SandboxConfig(url=asker.url, retries=1), sleep=Sleeper())
            found = await sandbox.execute("1", 1.0)
            await sandbox.close()
        assert len(fake.requests) == 2
        return found

    found = asyncio.run(whole())
    assert found.status is ExecutionStatus.INFRA and "the zygote died" in found.stderr


def test_the_client_loads_no_http_library_before_it_is_used() -> None:
    program = "import sys; import retool.sandbox.choose; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
