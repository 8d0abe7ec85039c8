"""A sandbox on another machine: ``retool sandbox serve``, or any service with SandboxFusion's HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from retool.config import SandboxConfig
from retool.errors import SandboxBroken, SandboxRefused
from retool.sandbox.base import OneLoopSandbox
from retool.sandbox.fusion import EndSessionRequest, RunCodeAnswer, RunCodeRequest, infra, result_of
from retool.types import ExecutionRequest, ExecutionResult, ExecutionStatus

if TYPE_CHECKING:
    import aiohttp  # imported when the first request is made: a local sandbox must not pay for it

COMPILE_S = 10.0
OVERHEAD_S = 10.0
"""verl's client gives up after compile + run + 10 s; so does this one, once the code runs."""
LINE_S = 120.0
"""On top of that, for the service's line: a deadline starts with the code, and giving up earlier throws away a run
that has begun and puts another at the line's end."""
_CONNECT_S = 10.0
_END_S = 5.0
"""For the message that a session is over; a service that misses it ends the session when it has been idle."""
_JSON_HEADERS = {"Content-Type": "application/json"}
_TRY_AGAIN = (429, 502, 503, 504)
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0
"""Also the longest ``Retry-After`` that is honoured."""
_SHOWN_CHARS = 300
"""Of an answer that makes no sense."""


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes
    retry_after_s: float | None

    @property
    def begun(self) -> bool:
        """Whether the service may have run some of the code: with ``Retry-After`` it has not."""
        return self.retry_after_s is None


class _NoReply(Exception):
    """The message says why."""

    def __init__(self, reason: str, *, begun: bool, again: bool = True) -> None:
        super().__init__(reason)
        self.begun = begun
        """Whether the service may have run some of the code."""
        self.again = again
        """Whether it is worth trying at once."""


class RemoteSandbox(OneLoopSandbox):
    """Runs Python programs by a service (``retool.protocols.Sandbox``).

    At most ``config.concurrency`` requests are under way, sessions' ends apart. A service that cannot be reached or is
    overloaded is asked again, ``config.retries`` times; what is left of its faults is ``ExecutionStatus.INFRA`` with
    the reason in stderr. Output beyond ``config.output_kb`` is cut and labelled as a local sandbox does it, whatever
    the service allows. Use it from one event loop.
    """

    def __init__(
        self,
        config: SandboxConfig,
        *,
        line_s: float = LINE_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__()
        self._config = config
        self._url = config.url.rstrip("/").removesuffix("/run_code")
        self._line_s = line_s
        self._sleep = sleep
        self._jitter = random.Random()
        self._name = uuid.uuid4().hex
        """Ours among all the service's clients: it keeps our sessions' names from being another's."""
        self._sessions: set[str] = set()
        self._ends: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(config.concurrency)

    async def start(self) -> None:
        """Find the service.

        Raises:
            SandboxBroken: it cannot be reached, or is not a sandbox.
        """
        try:
            reply = await self._ask("GET", "/v1/ping", None, OVERHEAD_S)
        except _NoReply as fault:
            raise SandboxBroken(
                f"sandbox.url = {self._config.url!r}: {fault}; start the service, or mend the address"
            ) from None
        if reply.status != 200 or b"pong" not in reply.body:
            raise SandboxBroken(
                f"sandbox.url = {self._config.url!r}: no sandbox answers there ({_shown(reply)}); give the address "
                "that 'retool sandbox serve' prints"
            )

    # -- running code --------------------------------------------------------------------------------------------------

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        """Run ``code`` as a Python program; see ``retool.protocols.Sandbox``.

        Raises:
            ValueError: ``timeout_s`` is not a positive, finite number.
            SandboxRefused: the service does not know ``config.token``.
            SandboxBroken: the service does not take our requests: other limits, or another API.
            RuntimeError: closed, or used from another event loop.
        """
        ExecutionRequest(code, timeout_s)  # checks the time
        self._check_use()
        try:
            code.encode()
        except UnicodeEncodeError as error:
            # JSON's readers disagree on lone surrogates, and Python has one answer to such a program.
            return ExecutionResult(ExecutionStatus.ERROR, stderr=f"UnicodeEncodeError: {error}\n", exit_code=1)
        request = RunCodeRequest(
            code=code,
            language="python",
            compile_timeout=COMPILE_S,
            run_timeout=timeout_s,
            memory_limit_MB=self._config.memory_mb,
        )
        if session:
            self._sessions.add(session)
            request.session = self._session_name(session)
        async with self._places:
            return self._cut(await self._insist(request))

    def _session_name(self, session: str) -> str:
        digest = hashlib.blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16)
        return f"{self._name}-{digest.hexdigest()}"

    async def _insist(self, request: RunCodeRequest) -> ExecutionResult:
        limit_s = self._line_s + COMPILE_S + request.run_timeout + OVERHEAD_S
        reason = "the sandbox was closed"
        for attempt in range(self._config.retries + 1):
            if self._closed:
                break
            least_s = 0.0
            try:
                reply = await self._ask("POST", "/run_code", request, limit_s)
                if reply.status not in _TRY_AGAIN:
                    return self._read(reply)
                reason, begun, again = f"the service answered {_shown(reply)}", reply.begun, True
                least_s = reply.retry_after_s or 0.0
            except _NoReply as fault:
                reason, begun, again = str(fault), fault.begun, fault.again
            # An interpreter that may have run the code already must not run it twice.
            if not again or (request.session and begun) or attempt == self._config.retries:
                break
            await self._sleep(self._delay(attempt, least_s))
        return infra(reason)

    def _delay(self, attempt: int, least_s: float) -> float:
        """Exponential, with jitter: clients that were turned away together do not come back together."""
        most_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempt)
        return min(_MAX_DELAY_S, least_s) + self._jitter.uniform(0, most_s)

    def _read(self, reply: _Reply) -> ExecutionResult:
        if reply.status in (401, 403):
            raise SandboxRefused(
                f"sandbox.url = {self._config.url!r}: the service refuses sandbox.token ({reply.status}); "
                "set it to what the service was started with"
            )
        if 400 <= reply.status < 500:
            raise SandboxBroken(f"sandbox.url = {self._config.url!r}: the service answered {_shown(reply)}")
        if reply.status != 200:
            return infra(f"the service answered {_shown(reply)}")
        try:
            answer = RunCodeAnswer.model_validate_json(reply.body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            return infra(f"the service's answer makes no sense: {where}: {first['msg']}: {_shown(reply)}")
        return result_of(answer)

    def _cut(self, result: ExecutionResult) -> ExecutionResult:
        limit = self._config.output_kb << 10
        stdout, stderr = _prefix(result.stdout, limit), _prefix(result.stderr, limit)
        if result.status is ExecutionStatus.INFRA or (stdout is result.stdout and stderr is result.stderr):
            return result
        return replace(
            result,
            status=ExecutionStatus.OUTPUT_LIMIT,
            stdout=stdout,
            stderr=stderr,
            exit_code=None,
            truncated=True,
        )

    # -- sessions and the end ------------------------------------------------------------------------------------------

    def release(self, session: str) -> None:
        """Tell the service that the session is over, in the background: the service's own idle limit is the net."""
        if session not in self._sessions or self._closed:
            return
        self._sessions.discard(session)
        task = asyncio.get_running_loop().create_task(self._end(self._session_name(session)))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end(self, name: str) -> None:
        with contextlib.suppress(_NoReply):
            await self._ask("POST", "/v1/sessions/end", EndSessionRequest(session=name), _END_S)

    async def close(self) -> None:
        """End our sessions and close the connections: the service kills what still runs on them."""
        if self._loop is asyncio.get_running_loop():
            for session in list(self._sessions):
                self.release(session)
            await asyncio.gather(*self._ends)
        self._closed = True
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, body: BaseModel | None, limit_s: float) -> _Reply:
        """Raises: _NoReply."""
        import aiohttp

        if self._http is None:
            self._check_use()
            self._http = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._config.token}"} if self._config.token else None,
                connector=aiohttp.TCPConnector(limit=0),  # ``_places`` is the limit
            )
        # What was not set is not sent: SandboxFusion need not know our fields.
        data = None if body is None else body.model_dump_json(exclude_unset=True).encode()
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=min(_CONNECT_S, limit_s))
        try:
            async with self._http.request(
                method, self._url + path, data=data, headers=_JSON_HEADERS, timeout=timeout
            ) as response:
                return _Reply(response.status, await response.read(), _seconds(response.headers.get("Retry-After")))
        except aiohttp.ClientConnectorError as error:
            raise _NoReply(f"cannot connect: {error.os_error.strerror or error.os_error}", begun=False) from None
        except aiohttp.ConnectionTimeoutError:
            raise _NoReply(f"no connection within {_CONNECT_S:g} s", begun=False) from None
        except TimeoutError:
            raise _NoReply(f"no answer within {limit_s:g} s", begun=True, again=False) from None
        except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: closed meanwhile
            raise _NoReply(f"the connection broke: {error or type(error).__name__}", begun=True) from None


def _seconds(retry_after: str | None) -> float | None:
    """0 for a date."""
    if retry_after is None:
        return None
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _prefix(text: str, limit: int) -> str:
    """``text`` itself, or what of it fits into ``limit`` bytes of UTF-8."""
    if len(text) * 4 <= limit or len(data := text.encode("utf-8", "replace")) <= limit:
        return text
    return data[:limit].decode("utf-8", "ignore")


def _shown(reply: _Reply) -> str:
    text = " ".join(reply.body.decode("utf-8", "replace").split())
    return f"{reply.status}: {text[:_SHOWN_CHARS]}"
