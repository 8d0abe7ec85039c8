"""The HTTP service, in front of a scripted sandbox and of the real one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Asker, ServedFake, done, infra_result, service

from retool.config import SandboxConfig
from retool.errors import SandboxBroken
from retool.sandbox import LocalSandbox
from retool.types import Execution, ExecutionResult, ExecutionStatus

LIMITS = SandboxConfig(timeout_s=20, memory_mb=512)
Scenario = Callable[[Asker], Awaitable[Any]]


def ask(sandbox: ServedFake, scenario: Scenario, limits: SandboxConfig = LIMITS, **settings: Any) -> Any:
    async def whole() -> Any:
        async with service(sandbox, limits, **settings) as asker:
            return await scenario(asker)

    return asyncio.run(whole())


def test_ping_answers_and_every_answer_names_the_tier() -> None:
    async def scenario(asker: Asker) -> None:
        async with asker.http.get(asker.url + "/v1/ping") as response:
            assert (response.status, await response.json()) == (200, "pong")
            assert response.headers["X-Sandbox-Tier"] == "userns"
        for path in ("/nothing", "/run_code"):
            async with asker.http.get(asker.url + path) as response:
                assert response.status == (404 if path == "/nothing" else 405)
                assert response.headers["X-Sandbox-Tier"] == "userns"
                assert (await response.json())["detail"]
        reply = await asker.run()
        assert (reply.data["tier"], reply.data["executor_pod_name"]) == ("userns", "retool-userns")
        assert reply.headers["X-Sandbox-Tier"] == "userns"

    ask(ServedFake(), scenario)


@pytest.mark.parametrize(
    ("result", "status", "run_status", "says"),
    [
        (ExecutionResult(ExecutionStatus.OK, "out", "err", 0, 0.5), "Success", "Finished", ""),
        (ExecutionResult(ExecutionStatus.ERROR, "", "Traceback", 1, 0.5), "Failed", "Finished", ""),
        (ExecutionResult(ExecutionStatus.KILLED, "", "", -11, 0.5), "Failed", "Finished", ""),
        (ExecutionResult(ExecutionStatus.MEMORY, "", "", -9, 0.5), "Failed", "Finished", "out of memory"),
        (ExecutionResult(ExecutionStatus.MEMORY, "", "MemoryError", 1, 0.5), "Failed", "Finished", "out of memory"),
        (ExecutionResult(ExecutionStatus.TIMEOUT, "so far", "", None, 9.0), "Failed", "TimeLimitExceeded", ""),
        (ExecutionResult(ExecutionStatus.OUTPUT_LIMIT, "xx", "", None, 0.5, True), "Failed", "Error", "its output cut"),
    ],
)
def test_every_ending_in_sandbox_fusions_words(
    result: ExecutionResult, status: str, run_status: str, says: str
) -> None:
    reply = ask(ServedFake(lambda request: result), lambda asker: asker.run())
    assert reply.status == 200
    assert reply.data["status"] == status
    assert says in reply.data["message"] and bool(says) == bool(reply.data["message"])
    assert reply.data["compile_result"] is None
    assert reply.data["run_result"] == {
        "status": run_status,
        "execution_time": result.duration_s,
        "return_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "truncated": result.truncated,
        "retool_status": result.status,
    }


@pytest.mark.parametrize("fault", [infra_result("the zygote died"), SandboxBroken("the zygote died")])
def test_the_sandboxes_own_fault_is_503(fault: Any) -> None:
    reply = ask(ServedFake(lambda request: fault), lambda asker: asker.run())
    assert reply.status == 503
    assert (reply.data["detail"], reply.data["retool_status"]) == ("the zygote died", "infra")
    assert "Retry-After" not in reply.headers


def test_a_bug_is_500_and_says_nothing_of_itself() -> None:
    reply = ask(ServedFake(lambda request: ZeroDivisionError("secret")), lambda asker: asker.run())
    assert reply.status == 500
    assert "secret" not in reply.data["detail"]


def test_a_request_reaches_the_sandbox_whole() -> None:
    brought = Execution(done(""), {"out/b.bin": b"\0\xff"}, {"c": "a symbolic link"})
    sandbox = ServedFake(lambda request: brought)
    files = {"a.csv": base64.b64encode(b"1,2\n").decode(), "wrapped": "MSwy\nCg==\n", "left/out": None}
    fields = {"files": files, "fetch_files": ["out/b.bin", "c"], "stdin": "é", "memory_limit_MB": 100, "session": "s"}
    reply = ask(sandbox, lambda asker: asker.run("code", run_timeout=3, compile_timeout=0, **fields))
    assert reply.data["files"] == {"out/b.bin": "AP8="}
    assert reply.data["not_fetched"] == {"c": "a symbolic link"}
    [request] = sandbox.requests
    assert (request.code, request.timeout_s, request.stdin) == ("code", 3.0, "é".encode())
    assert request.files == {"a.csv": b"1,2\n", "wrapped": b"1,2\n"}
    assert (request.fetch, request.session, request.memory_mb) == (("out/b.bin", "c"), "s", 100)


def test_what_is_not_asked_for_is_the_services_own() -> None:
    sandbox = ServedFake()

    async def scenario(asker: Asker) -> None:
        await asker.run()
        await asker.run(memory_limit_MB=-1, files={}, fetch_files=[], stdin=None, args=[])

    ask(sandbox, scenario, SandboxConfig(timeout_s=7))
    for request in sandbox.requests:
        assert (request.timeout_s, request.stdin, request.memory_mb, request.session) == (7.0, b"", None, "")


def body(**fields: Any) -> dict[str, Any]:
    return {"code": "1", "language": "python"} | fields


def raw(fields: str) -> bytes:
    return ('{"code": "1", "language": "python", ' + fields + "}").encode()


@pytest.mark.parametrize(
    ("sent", "where", "says"),
    [
        (body(run_timeout=0), ["body", "run_timeout"], "greater than 0"),
        (body(run_timeout=-1), ["body", "run_timeout"], "greater than 0"),
        (body(run_timeout=21), ["body", "run_timeout"], "at most 20 s"),
        (body(run_timeout=True), ["body", "run_timeout"], "true or false"),
        (body(run_timeout="soon"), ["body", "run_timeout"], "valid number"),
        (raw('"run_timeout": NaN'), ["body", "run_timeout"], "finite"),
        (raw('"run_timeout": Infinity'), ["body", "run_timeout"], "finite"),
        (raw('"run_timeout": 1e999'), ["body", "run_timeout"], "finite"),
        (raw('"compile_timeout": -Infinity'), ["body", "compile_timeout"], ""),
        (body(compile_timeout=-1), ["body", "compile_timeout"], ""),
        (body(memory_limit_MB=513), ["body", "memory_limit_MB"], "at most 512"),
        (body(memory_limit_MB=0), ["body", "memory_limit_MB"], "at least 1, or -1"),
        (body(memory_limit_MB=1.5), ["body", "memory_limit_MB"], ""),
        (body(language="cpp"), ["body", "language"], "language = 'cpp': supported here: 'python'"),
        (body(language=3), ["body", "language"], "valid string"),
        ({"code": "1"}, ["body", "language"], "required"),
        ({"language": "python"}, ["body", "code"], "required"),
        (body(code=["1"]), ["body", "code"], "valid string"),
        (body(code=None), ["body", "code"], "valid string"),
        (body(stdin=5), ["body", "stdin"], "valid string"),
        (body(files=[]), ["body", "files"], ""),
        (body(files={"a": 1}), ["body", "files", "a"], "valid string"),
        (body(files={"../a": ""}), ["body"], "'../a': give a relative path"),
        (body(files={"/etc/passwd": ""}), ["body"], "'/etc/passwd': give a relative path"),
        (body(fetch_files=["../a"]), ["body"], "give a relative path"),
        (body(fetch_files="a"), ["body", "fetch_files"], ""),
        (body(args=["-x"]), ["body", "args"], "at most 0"),
        (body(surprise=1), ["body", "surprise"], "not permitted"),
        ([], ["body"], ""),
        (b"", ["body"], "Invalid JSON"),
        (b'{"code": ', ["body"], "Invalid JSON"),
        (b"[" * 100_000, ["body"], "Invalid JSON"),
        (b'{"code": "\xff", "language": "python"}', ["body"], "Invalid JSON"),
        (b'{"code": "\\ud800", "language": "python"}', ["body"], "Invalid JSON"),
    ],
)
def test_a_wrong_request_is_answered_by_what_is_wrong(sent: Any, where: list[str], says: str) -> None:
    sandbox = ServedFake()

    async def scenario(asker: Asker) -> None:
        reply = await asker.post("/run_code", sent)
        assert reply.status == 422, reply
        assert all(set(item) == {"loc", "msg", "type"} for item in reply.data["detail"])
        assert reply.data["detail"][0]["loc"] == where
        assert says in reply.data["detail"][0]["msg"]
        assert sandbox.requests == []
        assert (await asker.run("next")).data["run_result"]["stdout"] == "ran next"

    ask(sandbox, scenario)


@pytest.mark.parametrize("content", ["%%%%", "abc", "é", "YQ"])
def test_a_file_that_is_not_base64_is_a_sandbox_error(content: str) -> None:
    async def scenario(asker: Asker) -> None:
        for path, rest in (("/run_code", body()), ("/run_jupyter", {"cells": ["1"]})):
            reply = await asker.post(path, rest | {"files": {"a": content}})
            assert (reply.status, reply.data["status"]) == (200, "SandboxError")
            assert reply.data["message"].startswith("files['a'] is not base64")

    ask(ServedFake(), scenario)


def test_a_request_that_is_too_large_is_413() -> None:
    sandbox = ServedFake()
    large = json.dumps(body(code="#" * 50_000_000)).encode()

    async def in_pieces() -> Any:
        for start in range(0, len(large), 1 << 20):
            yield large[start : start + (1 << 20)]

    async def scenario(asker: Asker) -> None:
        reply = await asker.post("/run_code", large)
        assert (reply.status, reply.data["detail"][0]["type"]) == (413, "too_large")
        assert "32 MiB" in reply.data["detail"][0]["msg"]
        headers = {"Content-Type": "application/json"}
        async with asker.http.post(asker.url + "/run_code", data=in_pieces(), headers=headers) as response:
            assert response.status == 413
            assert (await response.json())["detail"][0]["type"] == "too_large"
        assert (await asker.run("next")).data["run_result"]["stdout"] == "ran next"

    ask(sandbox, scenario)


def test_a_web_page_cannot_post_code() -> None:
    """A page on this machine may send anything but JSON across origins without being asked."""
    sandbox = ServedFake()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind}
        reply = ask(sandbox, lambda asker, h=headers: asker.post("/run_code", body(), headers=h))
        assert reply.status == 415
        assert kind in reply.data["detail"][0]["msg"]
    assert sandbox.requests == []


def test_a_limit_that_only_the_sandbox_knows_is_422() -> None:
    sandbox = ServedFake(lambda request: ValueError("processes = 9: this sandbox allows 4"))
    reply = ask(sandbox, lambda asker: asker.run())
    assert (reply.status, reply.data["detail"][0]["msg"]) == (422, "processes = 9: this sandbox allows 4")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"X-API-Key": "s3cre"}, 401),
        ({"X-API-Key": "ü"}, 401),
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"Authorization": "bearer s3cret"}, 200),
        ({"X-API-Key": "s3cret"}, 200),
    ],
)
def test_a_token_opens_everything_and_ping_is_open(headers: dict[str, str], status: int) -> None:
    sandbox = ServedFake()

    async def scenario(asker: Asker) -> None:
        assert (await asker.get("/v1/ping"))[0] == 200
        for path, sent in (
            ("/run_code", body()),
            ("/run_jupyter", {"cells": []}),
            ("/v1/sessions/end", {"session": "s"}),
        ):
            assert (await asker.post(path, sent, headers=headers)).status == status
        assert (await asker.get("/metrics", headers=headers))[0] == status

    ask(sandbox, scenario, token="s3cret")
    assert bool(sandbox.requests) == (status == 200)


def test_a_full_line_turns_requests_away() -> None:
    sandbox = ServedFake()

    async def scenario(asker: Asker) -> None:
        sandbox.waiting = 5
        for path, sent in (("/run_code", body()), ("/run_jupyter", {"cells": ["1"]})):
            reply = await asker.post(path, sent)
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert sandbox.requests == []
        sandbox.waiting = 4
        assert (await asker.run()).status == 200

    ask(sandbox, scenario, max_queue=5)


async def until(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("path", "sent"), [("/run_code", body()), ("/run_jupyter", {"cells": ["1", "2"]})])
def test_a_client_that_goes_away_takes_its_run_with_it(path: str, sent: Any) -> None:
    async def scenario() -> None:
        sandbox = ServedFake(held=True)
        async with service(sandbox) as asker:
            asking = asyncio.create_task(asker.post(path, sent))
            await sandbox.begun.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: sandbox.cancelled == 1)
            assert len(sandbox.released) == (path == "/run_jupyter")
            sandbox.held = False
            assert (await asker.run("next")).data["run_result"]["stdout"] == "ran next"
            assert "retool_sandbox_abandoned_total 1.0" in (await asker.get("/metrics"))[1]

    asyncio.run(scenario())


def test_a_session_can_be_ended() -> None:
    sandbox = ServedFake()
    reply = ask(sandbox, lambda asker: asker.post("/v1/sessions/end", {"session": "mine"}))
    assert (reply.status, reply.data, sandbox.released) == (200, {"status": "Success"}, ["mine"])


def test_the_metrics_add_up() -> None:
    statuses = {status.value: status for status in ExecutionStatus}
    sandbox = ServedFake(lambda request: ExecutionResult(statuses[request.code], exit_code=0))

    async def scenario(asker: Asker) -> str:
        for code in ("ok", "ok", "timeout", "infra"):
            await asker.run(code)
        await asker.run("ok", language="cpp")
        await asker.post("/run_jupyter", {"cells": ["ok", "error"]})
        sandbox.waiting, sandbox.running = 7, 2
        return (await asker.get("/metrics"))[1]

    page = ask(sandbox, scenario)
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    assert found["retool_sandbox_queue_length",] == 7
    assert found["retool_sandbox_running",] == 2
    assert found["retool_sandbox_workers",] == 3
    assert found["retool_sandbox_tier", "userns"] == 1
    assert found["retool_sandbox_requests_total", "ok", "run_code"] == 2
    assert found["retool_sandbox_requests_total", "run_code", "timeout"] == 1
    assert found["retool_sandbox_requests_total", "infra", "run_code"] == 1
    assert found["retool_sandbox_requests_total", "ok", "run_jupyter"] == 1
    assert found["retool_sandbox_infra_faults_total",] == 1
    assert found["retool_sandbox_rejected_total", "invalid"] == 1
    assert found["retool_sandbox_request_seconds_count", "run_code"] == 4


# The real sandbox.


def ask_really(scenario: Callable[[Asker, LocalSandbox], Awaitable[Any]], workers: int = 2) -> Any:
    async def whole() -> Any:
        limits = SandboxConfig(workers=workers, timeout_s=20, memory_mb=512, preload=[])
        sandbox = LocalSandbox(limits)
        async with service(sandbox, limits) as asker:
            return await scenario(asker, sandbox)

    return asyncio.run(whole())


def test_real_endings() -> None:
    async def scenario(asker: Asker, sandbox: LocalSandbox) -> None:
        for code, status, return_code, says in [
            ("", "Success", 0, ""),
            ("6 * 7", "Success", 0, "42\n"),
            ("print(input())", "Success", 0, "typed\n"),
            ("print(open('d/a.txt').read())", "Success", 0, "x\n"),
            ("raise SystemExit(3)", "Failed", 3, ""),
            ("print(1)\0", "Failed", 1, ""),
            ("import os; os.kill(os.getpid(), 9)", "Failed", -9, ""),
        ]:
            reply = await asker.run(code, stdin="typed\n", files={"d/a.txt": "eA=="})
            run = reply.data["run_result"]
            assert (reply.data["status"], run["return_code"], run["stdout"]) == (status, return_code, says), code
        reply = await asker.run("print('so far', flush=True)\nwhile True: pass", run_timeout=0.5)
        assert reply.data["run_result"]["status"] == "TimeLimitExceeded"
        assert (reply.data["run_result"]["stdout"], reply.data["run_result"]["return_code"]) == ("so far\n", None)
        reply = await asker.run("print('x' * 100_000)")
        assert (reply.data["run_result"]["status"], len(reply.data["run_result"]["stdout"])) == ("Error", 64 << 10)
        reply = await asker.run("open('b', 'w').write('made')", fetch_files=["b", "c"])
        assert reply.data["files"] == {"b": base64.b64encode(b"made").decode()}
        assert list(reply.data["not_fetched"]) == ["c"]
        assert reply.data["tier"] == sandbox.info.tier if sandbox.info else None

    ask_really(scenario)


def test_real_sessions() -> None:
    async def scenario(asker: Asker, sandbox: LocalSandbox) -> None:
        await asker.run("a = 1", session="one")
        await asker.run("a = 2", session="two")
        assert (await asker.run("a", session="one")).data["run_result"]["stdout"] == "1\n"
        await asker.post("/v1/sessions/end", {"session": "one"})
        reply = await asker.run("a", session="one")
        assert reply.data["run_result"]["return_code"] == 1
        assert "NameError" in reply.data["run_result"]["stderr"]

    ask_really(scenario, workers=4)


def test_a_real_run_dies_with_its_client_in_line_and_at_work() -> None:
    async def scenario(asker: Asker, sandbox: LocalSandbox) -> None:
        asking = [asyncio.create_task(asker.run("while True: pass", run_timeout=20)) for _ in range(3)]
        await until(lambda: (sandbox.running, sandbox.waiting) == (1, 2))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: (sandbox.running, sandbox.waiting) == (0, 0))
        assert (await asker.run("print(2)")).data["run_result"]["stdout"] == "2\n"

    ask_really(scenario, workers=1)


def test_many_clients_at_once_get_their_own_answers() -> None:
    async def scenario(asker: Asker, sandbox: LocalSandbox) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            many = Asker(asker.url, http, asker.listener)
            replies = await asyncio.gather(*(many.run(f"print({n})") for n in range(100)))
        assert [reply.data["run_result"]["stdout"] for reply in replies] == [f"{n}\n" for n in range(100)]

    ask_really(scenario)
