"""The sandbox as a service that speaks SandboxFusion's HTTP API; docs/sandbox_service.md says where it differs."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from retool.config import SandboxConfig
from retool.errors import ReToolError
from retool.sandbox.fusion import (
    Answer,
    Base64Error,
    EndSessionRequest,
    Request,
    RunCodeAnswer,
    RunCodeRequest,
    RunJupyterAnswer,
    RunJupyterRequest,
    RunStatus,
    pod_name,
    run_answer,
)
from retool.sandbox.meters import CONTENT_TYPE, Meters
from retool.sandbox.notebook import InfraFault, Sessions, run_notebook
from retool.sandbox.tier import SandboxInfo
from retool.types import Execution, ExecutionRequest, ExecutionStatus

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a slot is free again within a run's time, mostly far below a second."""
TIER_HEADER = "X-Sandbox-Tier"
_LOG = logging.getLogger("retool.sandbox.server")
_Body = TypeVar("_Body", bound=BaseModel)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ServedSandbox(Sessions, Protocol):
    """What the service needs of ``LocalSandbox``."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def info(self) -> SandboxInfo | None: ...
    async def start(self) -> SandboxInfo: ...
    async def run(self, request: ExecutionRequest) -> Execution: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class ServerConfig:
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """``timeout_s`` and ``memory_mb`` are the most that a request may ask for."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0: any that is free."""
    token: str = ""
    """Not empty: what every request but ``/v1/ping`` has to show."""
    max_queue: int = 2048
    """Runs that may wait in line."""
    max_body_mb: int = 32
    drain_s: float = 30.0
    """How long running requests may still take once the service was told to stop."""
    access_log: bool = False


class Service:
    """The handlers, and what they count. ``draining`` refuses what is new; ``in_flight`` says what still runs."""

    def __init__(self, sandbox: ServedSandbox, config: ServerConfig) -> None:
        self.sandbox = sandbox
        self.config = config
        self.meters = Meters(lambda: sandbox.waiting, lambda: sandbox.running)
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def app(self) -> web.Application:
        app = web.Application(
            client_max_size=self.config.max_body_mb << 20, middlewares=[self._typed_errors, self._admission]
        )
        app.add_routes(
            [
                web.post("/run_code", self._run_code),
                web.post("/run_jupyter", self._run_jupyter),
                web.post("/v1/sessions/end", self._end_session),
                web.get("/v1/ping", self._ping),
                web.get("/metrics", self._metrics),
            ]
        )
        app[SERVICE] = self
        return app

    @property
    def tier(self) -> str:
        return self.sandbox.info.tier if self.sandbox.info is not None else ""

    # -- around every request ------------------------------------------------------------------------------------------

    @web.middleware
    async def _typed_errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Whatever happens is answered in JSON and says the tier."""
        try:
            response = await handler(request)
        except _Refused as refused:
            self.meters.rejected(refused.reason)
            response = refused.response
        except web.HTTPRequestEntityTooLarge:
            self.meters.rejected("too_large")
            response = self._too_large()
        except web.HTTPException as error:  # no such path, or another method
            response = _json({"detail": error.reason}, error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except asyncio.CancelledError:
            self.meters.abandoned()
            raise
        except Exception:
            if self.draining:  # the sandbox was closed between two runs of one request
                response = self._unavailable("the service is shutting down")
            else:
                _LOG.exception("%s %s failed", request.method, request.path)
                response = _json({"detail": "the service has a fault: its log has the traceback"}, 500)
        response.headers[TIER_HEADER] = self.tier
        return response

    @web.middleware
    async def _admission(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path != "/v1/ping":
            self._check_token(request)
        if self.draining and request.path != "/metrics":
            response = self._not_now("the service is shutting down")
            response.force_close()
            raise _Refused("draining", response)
        if request.method != "POST":
            return await handler(request)
        if request.content_type != "application/json":
            # Besides being wrong, any other type could be posted by a web page that is open on this machine.
            message = f"Content-Type = {request.content_type!r}: send application/json"
            raise _Refused("invalid", _detail(["header", "content-type"], message, "content_type", 415))
        if (request.content_length or 0) > self.config.max_body_mb << 20:
            raise _Refused("too_large", self._too_large())
        self.in_flight += 1
        self.idle.clear()
        try:
            return await handler(request)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    def _check_token(self, request: web.Request) -> None:
        expected = self.config.token
        if not expected:
            return
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode()):
            response = _json({"detail": "give the service's token: 'Authorization: Bearer …' or 'X-API-Key: …'"}, 401)
            response.headers["WWW-Authenticate"] = "Bearer"
            raise _Refused("unauthorized", response)

    # -- the endpoints -------------------------------------------------------------------------------------------------

    async def _run_code(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        body = await _parse(request, RunCodeRequest)
        body.run_timeout = self._allowed(body, "run_timeout", body.run_timeout)
        try:
            wanted = ExecutionRequest(
                body.code,
                body.run_timeout,
                stdin=(body.stdin or "").encode("utf-8", "surrogatepass"),
                files=body.decoded_files(),
                fetch=tuple(body.fetch_files),
                session=body.session,
                memory_mb=body.memory_mb,
            )
            self._check_queue()
            execution = await self.sandbox.run(wanted)
        except Base64Error as error:
            return self._sandbox_error(RunCodeAnswer, error)
        except ValueError as error:
            raise _invalid(str(error)) from None
        except ReToolError as error:
            return self._infra("run_code", str(error), started)
        result = execution.result
        if result.status is ExecutionStatus.INFRA:
            return self._infra("run_code", result.stderr, started)
        self.meters.answered("run_code", result.status, time.perf_counter() - started)
        return _answer(run_answer(execution, result.tier or self.tier))

    async def _run_jupyter(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        body = await _parse(request, RunJupyterRequest)
        body.total_timeout = self._allowed(body, "total_timeout", body.total_timeout)
        self._check_queue()
        try:
            answer = await run_notebook(self.sandbox, body, self.tier)
        except Base64Error as error:
            return self._sandbox_error(RunJupyterAnswer, error)
        except ValueError as error:
            raise _invalid(str(error)) from None
        except (InfraFault, ReToolError) as error:
            return self._infra("run_jupyter", str(error), started)
        ending = (answer.driver and answer.driver.retool_status) or ExecutionStatus.OK
        self.meters.answered("run_jupyter", ending, time.perf_counter() - started)
        return _answer(answer)

    async def _end_session(self, request: web.Request) -> web.Response:
        body = await _parse(request, EndSessionRequest)
        self.sandbox.release(body.session)
        return _json({"status": RunStatus.SUCCESS})

    async def _ping(self, request: web.Request) -> web.Response:
        return _json("pong")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.meters.page(), headers={"Content-Type": CONTENT_TYPE})

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _allowed(self, body: Request, name: str, seconds: float) -> float:
        """The request's seconds; what it did not ask for is not refused, but cut to what is allowed."""
        limits = self.config.sandbox
        if seconds > limits.timeout_s and name in body.model_fields_set:
            raise _invalid(f"{name} = {seconds:g}: this service allows at most {limits.timeout_s:g} s", name)
        if body.memory_limit_MB > limits.memory_mb:
            raise _invalid(
                f"memory_limit_MB = {body.memory_limit_MB}: this service allows at most {limits.memory_mb}",
                "memory_limit_MB",
            )
        return min(seconds, limits.timeout_s)

    def _check_queue(self) -> None:
        if self.sandbox.waiting >= self.config.max_queue:
            message = f"{self.sandbox.waiting} requests wait already: try again, or give the service more workers"
            raise _Refused("overloaded", self._not_now(message))

    def _infra(self, endpoint: str, reason: str, started: float) -> web.Response:
        self.meters.answered(endpoint, ExecutionStatus.INFRA, time.perf_counter() - started)
        return self._unavailable(reason or "the sandbox failed")

    def _unavailable(self, message: str) -> web.Response:
        return _json({"detail": message, "retool_status": ExecutionStatus.INFRA, "tier": self.tier}, 503)

    def _not_now(self, message: str) -> web.Response:
        """``Retry-After`` is how a client tells that none of its code has run, so that a stateful run may be sent
        again."""
        response = self._unavailable(message)
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response

    def _too_large(self) -> web.Response:
        message = f"this service takes at most {self.config.max_body_mb} MiB a request"
        return _detail(["body"], message, "too_large", 413)

    def _sandbox_error(self, kind: type[Answer], error: Exception) -> web.Response:
        self.meters.rejected("invalid")
        tier = self.tier
        return _answer(
            kind(status=RunStatus.SANDBOX_ERROR, message=str(error), executor_pod_name=pod_name(tier), tier=tier)
        )


SERVICE = web.AppKey("service", Service)


def make_app(sandbox: ServedSandbox, config: ServerConfig) -> web.Application:
    """The application; call it inside the event loop in which it is to run. Who runs it cancels a handler whose client
    goes away (``handler_cancellation`` of aiohttp's runner), which kills the run."""
    return Service(sandbox, config).app()


class _Refused(Exception):
    """Nothing was run."""

    def __init__(self, reason: str, response: web.Response) -> None:
        super().__init__(reason)
        self.reason = reason
        self.response = response


def _json(data: Any, status: int = 200) -> web.Response:
    # Escaped to ASCII: no string, whatever is in it, can fail to be sent.
    return web.Response(body=json.dumps(data).encode("ascii"), status=status, content_type="application/json")


def _answer(answer: Answer) -> web.Response:
    return _json(answer.model_dump())


def _detail(where: list[str | int], message: str, kind: str, status: int = 422) -> web.Response:
    return _json({"detail": [{"loc": where, "msg": message, "type": kind}]}, status)


def _invalid(message: str, *where: str) -> _Refused:
    return _Refused("invalid", _detail(["body", *where], message, "value_error"))


async def _parse(request: web.Request, kind: type[_Body]) -> _Body:
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as error:
        # Without the input: it may be as large as the request.
        found = error.errors(include_url=False, include_context=False, include_input=False)
        detail = [{"loc": ["body", *e["loc"]], "msg": e["msg"], "type": e["type"]} for e in found[:_MAX_ERRORS]]
        raise _Refused("invalid", _json({"detail": detail}, 422)) from None


_MAX_ERRORS = 20
