"""Asking a teacher behind any endpoint that speaks OpenAI's chat API, within a budget."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from retool.errors import ConfigError
from retool.types import Message

CONNECT_S = 10.0
"""For the connection alone: a server that is there takes it at once, however long it thinks afterwards."""
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
LONGEST_TOLD_WAIT_S = 3600.0
"""A server that says when it will answer again is believed; no quota lasts longer than an hour without a person."""
CHARS_PER_TOKEN = 2
"""A careful guess at a text's tokens where the server has not counted them: most text has three or four."""
NO_KEY = "none"
"""Endpoints of one's own ask for no key; the client wants to send one."""
UNREACHABLE = "cannot be reached"
PASSING = (408, 409, 429)
"""Besides 5xx: what may be different at the next try."""


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is asked.

    Raises:
        ConfigError: the address or the key cannot be used.
    """

    url: str
    model: str
    key: str = ""
    temperature: float = 0.7
    max_tokens: int = 4096
    """Of one answer."""
    timeout_s: float = 300.0
    """Of one request, from its first byte to the answer's last."""
    retries: int = 4
    """After a failure that may pass: 408, 409, 429, 5xx, no connection, no answer in time, an answer that is none."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # half an IPv6 address, or a port that is no number
            usable = False
        if "@" in self.url:
            raise ConfigError("--teacher holds a user or a password: put the secret where --key-env says")
        if not usable:
            raise ConfigError(f"--teacher {self.url!r}: give an address like http://127.0.0.1:8000/v1")
        if not (self.key.isascii() and self.key.isprintable() and self.key == self.key.strip()):
            # The value itself is a secret.
            raise ConfigError(
                "the key in --key-env holds characters that HTTP cannot carry: set it again, without them"
            )


@dataclass(frozen=True)
class Answer:
    """What the teacher said, as it goes into the journal."""

    text: str
    finish: str
    """OpenAI's finish_reason: ``stop``, ``length``, …"""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    guessed: bool = False
    """The server did not count tokens: both numbers come from ``CHARS_PER_TOKEN``."""


@dataclass
class Spent:
    """What one answer has cost besides its own tokens."""

    attempts: int = 0
    lost_tokens: int = 0
    """Of completions that held no answer."""


class AskError(Exception):
    """A problem that got no answer; the next start asks again. ``reason`` is one of a few; ``said`` is the server's."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason)
        self.reason, self.said = reason, said


class BudgetSpentError(Exception):
    """Nothing more may be asked."""


class Budget:
    """Requests and tokens that may be used, what was used in earlier runs included.

    Tokens are reserved before a request is sent (its prompt's, guessed, and the longest answer), so that the sum never
    passes the limit; what was not used goes back.
    """

    def __init__(self, requests: int = 0, tokens: int = 0) -> None:
        """0: no limit."""
        self.max_requests, self.max_tokens = requests, tokens
        self.requests = self.tokens = 0
        self._reserved = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def request(self, tokens: int) -> AsyncIterator[list[int]]:
        """One request that may take ``tokens``; put what it really took into the list that this yields.

        Raises:
            BudgetSpentError: there is no room for it, and will be none.
        """
        async with self._changed:
            while self.max_tokens and self.tokens + self._reserved + tokens > self.max_tokens:
                if not self._reserved:
                    raise BudgetSpentError
                await self._changed.wait()
            if self.max_requests and self.requests >= self.max_requests:
                raise BudgetSpentError
            self.requests += 1
            self._reserved += tokens
        used: list[int] = []
        try:
            yield used
        finally:
            self._reserved -= tokens
            self.tokens += sum(used)
            async with self._changed:
                self._changed.notify_all()


class Teacher:
    """An endpoint. Close it when done."""

    def __init__(self, config: TeacherConfig, budget: Budget) -> None:
        import openai

        self.config, self.budget = config, budget
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=config.key or NO_KEY,
            max_retries=0,
            timeout=openai.Timeout(config.timeout_s, connect=min(CONNECT_S, config.timeout_s)),
        )
        self._reached = False
        self._limit = "max_tokens"
        """What the endpoint calls it: OpenAI's newer models know ``max_completion_tokens`` alone, others do not."""

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, messages: list[Message], spent: Spent) -> Answer:
        """One answer, tried again with growing pauses. What it costs is added to ``spent`` as it goes.

        Raises:
            AskError: there was none, for good or after the last try.
            BudgetSpentError: the budget does not allow it.
            ConfigError: no request can succeed: the key, the model's name or the address is wrong.
        """
        written = sum(len(str(message["content"])) for message in messages)
        failure = AskError("not asked")
        for attempt in range(self.config.retries + 1):
            wait, limit = 0.0, self._limit
            async with self.budget.request(written // CHARS_PER_TOKEN + self.config.max_tokens) as used:
                spent.attempts += 1
                started = time.monotonic()
                try:
                    found = await self._send(messages, limit)
                    self._reached = True
                    answer = _read(found, written, time.monotonic() - started)
                    used.append(answer.prompt_tokens + answer.completion_tokens)
                    return answer
                except self._openai.APIStatusError as error:
                    self._reached = True
                    failure, wait = self._refusal(error, limit)
                except _NoAnswerError as error:
                    used.append(error.tokens)
                    spent.lost_tokens += error.tokens
                    failure = AskError("no completion in the answer", str(error))
                except (self._openai.APIError, TimeoutError, ValueError) as error:
                    failure = self._failure(error)
                    self._reached |= failure.reason != UNREACHABLE
            if attempt < self.config.retries:
                await asyncio.sleep(_pause(attempt, wait))
        if not self._reached:
            raise ConfigError(f"--teacher {self.config.url!r}: {failure.reason}; start the server, or mend the address")
        raise failure

    async def _send(self, messages: list[Message], limit: str) -> Any:
        # The client's own limit is on each read: a server that drips would never reach it.
        async with asyncio.timeout(self.config.timeout_s):
            return await self._client.chat.completions.create(
                model=self.config.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=self.config.temperature,
                extra_body={limit: self.config.max_tokens},
            )

    def _refusal(self, error: Any, limit: str) -> tuple[AskError, float]:
        """Why a request was refused that may be sent again, and how long the server wants us to wait at least.

        Raises:
            AskError: it is no use to send it again.
            ConfigError: it is no use to send any.
        """
        status, said = int(error.status_code), self._said(error)
        if status in (401, 403):
            what = "refuses the key" if self.config.key else "wants a key, and none is set"
            raise ConfigError(f"--teacher {self.config.url!r} {what} ({status}); set it in the variable of --key-env")
        if status == 404:
            raise ConfigError(
                f"--model {self.config.model!r}: {self.config.url!r} answers 404 ({said}); mend the name or the address"
            )
        failure = AskError(f"HTTP {status}", said)
        if status == 400 and "max_completion_tokens" in said and limit == "max_tokens":
            self._limit = "max_completion_tokens"
        elif status < 500 and status not in PASSING:
            raise failure
        return failure, told_wait(error.response.headers.get("retry-after", ""), datetime.now(UTC))

    def _said(self, error: Any) -> str:
        """The server's words, without the key, should it quote it."""
        body = error.body
        said = " ".join(str(body.get("message", body) if isinstance(body, dict) else error.message).split())
        return (said.replace(self.config.key, "…") if self.config.key else said)[:200]

    def _failure(self, error: Exception) -> AskError:
        connecting = type(error.__cause__).__name__ == "ConnectTimeout"
        if isinstance(error, TimeoutError | self._openai.APITimeoutError) and not connecting:
            return AskError(f"no answer within {self.config.timeout_s:g} s")
        if isinstance(error, self._openai.APIConnectionError):
            return AskError(UNREACHABLE)
        return AskError("no completion in the answer", " ".join(str(error).split())[:200])


class _NoAnswerError(Exception):
    def __init__(self, reason: str, tokens: int) -> None:
        super().__init__(reason)
        self.tokens = tokens


def _pause(attempt: int, told: float) -> float:
    """Seconds before the next try; spread, so that what was refused together does not come back together."""
    spread = random.uniform(0.5, 1.5)
    own: float = FIRST_WAIT_S * 2**attempt * spread
    return max(min(LONGEST_WAIT_S, own), told * (1 + spread / 10))


def told_wait(header: str, now: datetime) -> float:
    """Seconds that a Retry-After asks for, in numbers or as a date; 0 where it asks for nothing that can be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - now).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a zone
            return 0.0
    return min(max(seconds, 0.0), LONGEST_TOLD_WAIT_S) if math.isfinite(seconds) else 0.0


def _read(found: Any, written: int, seconds: float) -> Answer:
    """The completion; ``written``: the prompt's characters.

    Raises:
        _NoAnswerError: it is none.
    """
    usage = getattr(found, "usage", None)
    prompt, completion = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    choices = getattr(found, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        raise _NoAnswerError("no choices", prompt + completion)
    text = message.content if isinstance(message.content, str) else ""
    if guessed := not prompt + completion:
        prompt, completion = written // CHARS_PER_TOKEN, len(text) // CHARS_PER_TOKEN
    finish = str(getattr(choice, "finish_reason", None) or "")
    return Answer(text, finish, prompt, completion, round(seconds, 3), guessed)


def _count(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and count > 0 else 0
