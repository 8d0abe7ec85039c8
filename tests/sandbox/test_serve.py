"""From a bound socket to a drained service."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from served import ServedFake, serving

from retool.cli import main
from retool.config import SandboxConfig
from retool.errors import SandboxBroken, UserError
from retool.sandbox.serve import Stop, bind, check_exposure, is_loopback, serve
from retool.sandbox.server import ServerConfig
from retool.sandbox.tier import SandboxInfo

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_others_are_let_in_with_a_token_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    check_exposure(ServerConfig(host=host, token="t"))
    if loopback:
        check_exposure(ServerConfig(host=host))
    else:
        with pytest.raises(UserError, match="give --token or set RETOOL_SANDBOX_TOKEN"):
            check_exposure(ServerConfig(host=host))


def test_a_port_in_use_and_an_address_of_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port = {port}: Address already in use; choose another port"):
            bind(ServerConfig(port=port))
    with pytest.raises(UserError, match=r"--host = '203.0.113.1'"):
        bind(ServerConfig(host="203.0.113.1", port=0))
    for host in ("no such host", "x" * 300, "a..b"):
        with pytest.raises(UserError, match="give an address of this machine"):
            bind(ServerConfig(host=host))


def test_a_mistake_starts_no_sandbox() -> None:
    sandbox = ServedFake()
    with pytest.raises(UserError):
        asyncio.run(serve(sandbox, ServerConfig(host="0.0.0.0"), announce=print))
    assert sandbox.info is None


def test_a_sandbox_that_does_not_start_is_closed() -> None:
    class Broken(ServedFake):
        async def start(self) -> SandboxInfo:
            raise SandboxBroken("no")

    sandbox = Broken()
    with pytest.raises(SandboxBroken):
        asyncio.run(serve(sandbox, ServerConfig(port=0), announce=print))
    assert sandbox.closed


Scenario = Callable[[str, ServedFake, Stop], Awaitable[Any]]


def serve_and(scenario: Scenario, *, drain_s: float = 30.0) -> tuple[Any, ServedFake]:
    """Run the scenario beside a service whose runs are held; the scenario stops it."""

    async def whole() -> tuple[Any, ServedFake]:
        sandbox, stop = ServedFake(held=True), Stop()
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = ServerConfig(SandboxConfig(), port=0, drain_s=drain_s)
        serving = asyncio.create_task(serve(sandbox, config, announce=said.set_result, stop=stop))
        line = await asyncio.wait_for(said, 10)
        assert "tier userns, 3 workers, layers: seccomp, rlimits; metrics at" in line
        url = line.split()[2].rstrip(",;")
        try:
            return await asyncio.wait_for(scenario(url, sandbox, stop), 30), sandbox
        finally:
            stop()
            await asyncio.wait_for(serving, 30)

    return asyncio.run(whole())


async def post(http: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with http.post(url + "/run_code", json={"code": "1", "language": "python"}) as response:
        return response.status, await response.json()


def test_a_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    async def scenario(url: str, sandbox: ServedFake, stop: Stop) -> None:
        async with aiohttp.ClientSession() as http, aiohttp.ClientSession() as kept:
            async with kept.get(url + "/v1/ping") as response:  # leaves a connection that outlives the listener
                assert response.status == 200
            running = asyncio.create_task(post(http, url))
            await sandbox.begun.wait()
            stop()
            await asyncio.sleep(0.05)
            status, body = await post(kept, url)
            assert (status, body["detail"]) == (503, "the service is shutting down")
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as fresh:
                    await post(fresh, url)
            assert not sandbox.closed and not running.done()
            sandbox.go.set()
            assert (await running)[0] == 200

    _, sandbox = serve_and(scenario)
    assert sandbox.closed


def test_a_drain_has_its_limit_and_answers_what_it_cuts_off() -> None:
    async def scenario(url: str, sandbox: ServedFake, stop: Stop) -> None:
        async with aiohttp.ClientSession() as http:
            running = asyncio.create_task(post(http, url))
            await sandbox.begun.wait()
            stop()
            status, body = await running
            assert (status, body["detail"]) == (503, "the sandbox was closed")

    serve_and(scenario, drain_s=0.2)


def test_a_second_signal_does_not_wait() -> None:
    async def scenario(url: str, sandbox: ServedFake, stop: Stop) -> None:
        async with aiohttp.ClientSession() as http:
            running = asyncio.create_task(post(http, url))
            await sandbox.begun.wait()
            stop()
            stop()
            assert (await running)[0] == 503

    serve_and(scenario, drain_s=10_000)


# The command.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--host = '0.0.0.0': "),
        (["--port", "99999"], "99999 is not in the range"),
        (["--tier", "castle"], "sandbox.tier = 'castle': "),
        (["--timeout", "0"], "sandbox.timeout_s = 0.0: "),
        (["--timeout", "nan"], "sandbox.timeout_s = nan: "),
        (["--memory-mb", "1"], "sandbox.memory_mb = 1: "),
        (["--token", "two\nlines"], "sandbox.token holds characters"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETOOL_SANDBOX_TOKEN", raising=False)
    assert main(["sandbox", "serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert says in captured.err


def ask(url: str, code: str) -> Any:
    body = json.dumps({"code": code, "language": "python", "run_timeout": 20}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/run_code", body, JSON), timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_command(signum: signal.Signals) -> None:
    async def scenario(url: str, pid_signal: Callable[[], None]) -> Any:
        running = asyncio.create_task(asyncio.to_thread(ask, url, "import time; time.sleep(1); print('finished')"))
        async with aiohttp.ClientSession() as http, asyncio.timeout(30):
            while True:
                async with http.get(url + "/metrics") as response:
                    if "retool_sandbox_running 1.0" in await response.text():
                        break
        pid_signal()
        return await running

    with serving("--workers", "2", "--preload", "math") as (process, url):
        answer = asyncio.run(scenario(url, lambda: process.send_signal(signum)))
        assert answer["run_result"]["stdout"] == "finished\n"
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
