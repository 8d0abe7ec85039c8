"""Asking a teacher behind any endpoint that speaks OpenAI's chat API, within a budget."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from retool.errors import ConfigError
from retool.types import Message

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
CHARS_PER_TOKEN = 2
"""A careful guess at a prompt's tokens before the server has counted them: most text has three or four."""
NO_KEY = "none"
"""Endpoints of one's own ask for no key; the client wants to send one."""


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is asked."""

    url: str
    model: str
    key: str = ""
    temperature: float = 0.7
    max_tokens: int = 4096
    """Of one answer."""
    timeout_s: float = 300.0
    retries: int = 4
    """After a failure that may pass: 408, 409, 429, 5xx, no connection, no answer in time, an answer that is none."""


@dataclass(frozen=True)
class Answer:
    """What the teacher said."""

    text: str
    finish: str
    """OpenAI's finish_reason: ``stop``, ``length``, …"""
    prompt_tokens: int
    completion_tokens: int
    attempts: int
    seconds: float


class AskError(Exception):
    """A problem that got no answer; the next start asks again."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.reason, self.attempts = reason, attempts


class BudgetSpentError(Exception):
    """Nothing more may be asked."""

    attempts = 0
    """Requests that were sent for this answer before."""


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
            base_url=config.url, api_key=config.key or NO_KEY, max_retries=0, timeout=config.timeout_s
        )
        self._reached = False

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, messages: list[Message]) -> Answer:
        """One answer, tried again with growing pauses.

        Raises:
            AskError: there was none, for good or after the last try.
            BudgetSpentError: the budget does not allow it.
            ConfigError: no request can succeed: the key, the model's name or the address is wrong.
        """
        started = time.monotonic()
        expected = sum(len(str(m["content"])) for m in messages) // CHARS_PER_TOKEN + self.config.max_tokens
        reason = ""
        for attempt in range(self.config.retries + 1):
            wait: float | None = None
            async with self._within_budget(expected, attempt) as used:
                try:
                    found = await self._client.chat.completions.create(
                        model=self.config.model,
                        messages=messages,  # type: ignore[arg-type]
                        temperature=self.config.temperature,
                        max_tokens=self.config.max_tokens,
                    )
                    used.append(_total(found))
                    self._reached = True
                    return _read(found, attempt + 1, time.monotonic() - started)
                except self._openai.APIStatusError as error:
                    self._reached = True
                    reason, wait = self._status(error, attempt + 1)
                except (self._openai.APIError, _NoAnswerError, ValueError) as error:
                    reason = self._failure(error)
            if attempt < self.config.retries:
                pause = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(LONGEST_WAIT_S, max(pause, wait or 0.0)))
        if not self._reached:
            raise ConfigError(f"--teacher {self.config.url!r}: {reason}; start the server, or mend the address")
        raise AskError(reason, self.config.retries + 1)

    @asynccontextmanager
    async def _within_budget(self, tokens: int, attempts: int) -> AsyncIterator[list[int]]:
        try:
            async with self.budget.request(tokens) as used:
                yield used
        except BudgetSpentError as error:
            error.attempts = attempts
            raise

    def _status(self, error: Any, attempt: int) -> tuple[str, float | None]:
        """Why a request was refused, and how long the server wants us to wait, where it may be sent again."""
        status = int(error.status_code)
        body = error.body
        said = " ".join(str(body.get("message", body) if isinstance(body, dict) else error.message).split())[:200]
        if status in (401, 403):
            raise ConfigError(f"--teacher {self.config.url!r} refuses the key ({status}); set it as --key-env says")
        if status == 404:
            raise ConfigError(
                f"--model {self.config.model!r}: {self.config.url!r} answers 404 ({said}); mend the name or the address"
            )
        if status < 500 and status not in (408, 409, 429):
            raise AskError(f"HTTP {status}: {said}", attempt)
        after = error.response.headers.get("retry-after", "")
        return f"HTTP {status}", float(after) if after.replace(".", "", 1).isdigit() else None

    def _failure(self, error: Exception) -> str:
        if isinstance(error, self._openai.APITimeoutError):
            return f"no answer within {self.config.timeout_s:g} s"
        if isinstance(error, self._openai.APIConnectionError):
            return "cannot be reached"
        return f"no answer of the chat API ({' '.join(str(error).split())[:100]})"


class _NoAnswerError(Exception):
    pass


def _total(found: Any) -> int:
    usage = getattr(found, "usage", None)
    return int(getattr(usage, "total_tokens", 0) or 0)


def _read(found: Any, attempts: int, seconds: float) -> Answer:
    choices = getattr(found, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise _NoAnswerError("no choices")
    usage = getattr(found, "usage", None)
    return Answer(
        str(choices[0].message.content or ""),
        str(choices[0].finish_reason or ""),
        int(getattr(usage, "prompt_tokens", 0) or 0),
        int(getattr(usage, "completion_tokens", 0) or 0),
        attempts,
        round(seconds, 3),
    )
