"""The local engine's sampler: many sequences in one batch that requests join and leave at any token.

A sequence lives in a slot (``engine/kv.py``) from its first turn until its session is released; between turns its keys
and values stay, so that when the session comes back only the observation is computed. This file decides who joins
when; ``engine/batch.py`` does the work of a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch

from retool.engine.batch import Batch, Request, Row, Stats
from retool.engine.kv import MIB, KVSlots
from retool.engine.sampling import StopStrings
from retool.errors import ConfigError, InvariantError
from retool.types import Finish, SamplingParams, TokenOutput

GATHER_STEPS = 4
"""Steps that a request may wait for others to join with while rows are decoding: each join costs a forward pass."""
GATHER_SHARE = 0.125
"""Waiting requests, as a share of the decoding rows, that join at once."""


class LocalPolicy:
    """A ``Policy`` on a Hugging Face causal language model (Qwen2, Qwen3, Llama, …), on the device that holds it.

    It samples from the model's own weights: after an update, call ``weights_updated``. Not for several threads; may
    be used from one event loop after another. A session must be released, or its slot stays taken: as many
    sequences as slots are served, the rest wait in the order of their arrival.

    ``deterministic``: the batch's composition does not depend on time. Rows decode until all their turns have ended;
    then the engine waits until every session has come back or was released, and goes on with them in
    the order of their first arrival.
    """

    def __init__(
        self,
        model: Any,
        *,
        decode: Callable[[list[int]], str],
        kv_budget_mb: int = 512,
        max_live: int = 256,
        max_context: int = 640,
        prefill_chunk: int = 2048,
        deterministic: bool = False,
    ):
        """
        Raises:
            ConfigError: the budget does not hold one sequence of ``max_context`` tokens.
        """
        kv = KVSlots(model, kv_budget_mb, max_live, max_context)
        if kv.slots_without_prefix < 1:
            needed = -(-kv.token_bytes * max_context // MIB)
            raise ConfigError(
                f"engine.kv_budget_mb = {kv_budget_mb} does not hold one sequence of {max_context} tokens: "
                f"give at least {needed}, or make rollout.max_context smaller"
            )
        self._model = model
        self._vocab: int = model.config.vocab_size
        self.max_context, self.deterministic = max_context, deterministic
        self.policy_version = 0
        self.stats = Stats()
        self._batch = Batch(kv, StopStrings(decode, self._vocab, kv.device), prefill_chunk, self.stats)
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals = 0
        self._held = 0
        """Steps that requests which could join have waited for others."""
        self._reset()

    def _reset(self) -> None:
        self._sessions: dict[str, Row] = {}
        self._queue: list[Row] = []
        self._batch.clear()

    # Requests

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        """See ``Policy``. A turn also ends (``Finish.LENGTH``) where ``max_context`` tokens are reached; with no room
        at all the output is empty. ``Finish.ABORT``: the session was released meanwhile.

        Raises:
            InvariantError: the ids do not extend what the session has, or the session is being sampled already.
            ValueError: no ids, an id outside the vocabulary, or ``max_tokens`` < 1.
        """
        row = self._sessions.get(session)
        known = row.known if row else []
        if not ids or params.max_tokens < 1:
            raise ValueError(f"session {session!r}: needs at least one id and max_tokens >= 1")
        if row and row.request:
            raise InvariantError(f"session {session!r} asks for a turn while another is being sampled")
        if ids[: len(known)] != known:
            raise InvariantError(f"session {session!r}: its ids do not begin with the {len(known)} that it had")
        fresh = ids[len(known) :]
        if fresh and not 0 <= min(fresh) <= max(fresh) < self._vocab:
            raise ValueError(f"session {session!r}: an id is outside the vocabulary of {self._vocab}")
        limit = min(params.max_tokens, self.max_context - len(ids))
        if limit < 1:
            return TokenOutput([], [], Finish.LENGTH, self.policy_version)
        if row is None:
            row = self._sessions[session] = Row(session, self._arrivals)
            self._arrivals += 1
        loop = asyncio.get_running_loop()
        request = row.request = Request(list(ids), params, limit, loop.create_future())
        self._queue.append(row)
        self._wake(loop)
        try:
            return await request.future
        except asyncio.CancelledError:
            if self._sessions.get(session) is row:
                del self._sessions[session]
                self._drop(row)
            raise

    def release(self, session: str) -> None:
        """The session is over: its slot is free. A turn that is being sampled ends with ``Finish.ABORT``."""
        row = self._sessions.pop(session, None)
        if row is None:
            return
        if row.request and not row.request.future.done():
            row.request.future.set_result(TokenOutput([], [], Finish.ABORT, self.policy_version))
        self._drop(row)
        if self._queue and self._loop and not self._loop.is_closed():
            self._wake(self._loop)

    def interrupt(self) -> None:
        """End every turn that is being sampled or waits for its first token, with the tokens so far
        (``Finish.ABORT``)."""
        partly = self._batch.so_far()
        for row in list(self._sessions.values()):
            request = row.request
            if request is None or request.future.done():
                continue
            tokens, logprobs = partly.get(row.session, ([], []))
            request.future.set_result(TokenOutput(tokens, logprobs, Finish.ABORT, self.policy_version))
            del self._sessions[row.session]
            self._drop(row)

    def weights_updated(self) -> None:
        """The weights have changed: everything that was computed with the old ones is forgotten.

        Raises:
            InvariantError: a session is live.
        """
        if self._sessions:
            raise InvariantError(f"weights updated while {len(self._sessions)} sessions are live; release them first")
        self.policy_version += 1
        self._reset()
        self._batch.kv.forget_prefix()

    def _drop(self, row: Row) -> None:
        row.dropped = True
        if row in self._queue:
            self._queue.remove(row)
        self._batch.unpark(row)

    # The driver

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._task is None or self._task.done() or self._loop is not loop:
            self._loop = loop
            self._task = loop.create_task(self._drive())

    async def _drive(self) -> None:
        """Steps while there is something to do; ``generate`` and ``release`` start it again."""
        self._model.eval()
        try:
            await asyncio.sleep(0)  # hear everyone who asks in this turn of the loop before the first batch is made
            while self._step():
                await asyncio.sleep(0)  # the sandbox's answers, and those who wait for tokens
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """No one may wait for a step that never comes, and no half-written slot may be read."""
        waiting = [row.request for row in self._sessions.values() if row.request]
        self._reset()
        self._batch.kv.forget_prefix()
        for request in waiting:
            if not request.future.done():
                request.future.set_exception(error)

    @torch.inference_mode()
    def _step(self) -> bool:
        """One forward pass, or False where nothing can run."""
        began = time.perf_counter()
        if self._batch.joining is None:
            self._batch.leave_dropped()
            self._admit()
        ended = self._batch.step()
        for turn in ended or []:
            if not turn.request.future.done():
                output = TokenOutput(turn.tokens, turn.logprobs, turn.finish, self.policy_version)
                turn.request.future.set_result(output)
        self.stats.busy_s += time.perf_counter() - began
        return ended is not None

    # Who joins

    def _admit(self) -> None:
        ready = self._ready()
        if not ready:
            return
        self._held += 1
        decoding = len(self._batch.active)
        if decoding and self._held <= GATHER_STEPS and len(ready) < GATHER_SHARE * decoding:
            return
        self._held = 0
        joins = set(ready)
        self._queue = [row for row in self._queue if row not in joins]
        self._batch.seat(ready)

    def _ready(self) -> list[Row]:
        """Requests that can join now, in order. Those who hold a slot always can; newcomers take the free slots, and
        one that does not fit (too few slots, or slots too short for want of the prefix) holds up those behind it."""
        if not self._queue:
            return []
        if self.deterministic:
            if self._batch.active or any(row.request is None for row in self._batch.parked.values()):
                return []
            self._queue.sort(key=lambda row: row.order)
        if self._batch.idle:
            self._batch.lay_out([row.asked.ids for row in self._queue], keep=not self.deterministic)
        kv, free = self._batch.kv, self._batch.free
        ready, blocked = [], False
        for row in self._queue:
            if row.slot >= 0:
                ready.append(row)
            elif not blocked:
                row.shared = kv.shares_prefix(row.asked.ids)
                blocked = free < 1 or not (row.shared or kv.length >= self.max_context)
                if not blocked:
                    free -= 1
                    ready.append(row)
        return ready
