"""The local engine's sampler: many sequences in one batch that requests join and leave at any token.

Sequences live in the slots of ``engine/kv.py``. Those being decoded are kept at the front, ``[0:n)``; one whose turn
ended is *parked* behind them with its keys and values, so that when its session comes back only the
observation is computed. A step is one forward pass: either new tokens of joining rows, or one token for every row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retool.engine.kv import KVSlots
from retool.engine.sampling import OWN, SHARED, TOKEN, StopStrings, Turns
from retool.errors import ConfigError, InvariantError
from retool.types import Finish, SamplingParams, TokenOutput

MIN_PREFIX = 16
"""Shorter common prefixes are not worth a second matrix product."""
GATHER_STEPS = 4
"""Steps that a request may wait for others to join with while rows are decoding: each join costs a forward pass."""
GATHER_SHARE = 0.125
"""Waiting requests, as a share of the decoding rows, that join at once."""
KEEP_SHARE = 0.75
"""A prefix that is still there is kept while it has this share of what the waiting prompts have in common."""
PAD_FACTOR = 2
"""Attention of joining rows is padded to the longest: at most this many times ``prefill_chunk`` tokens."""


@dataclass
class Stats:
    """Counters since the policy was made."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    """Tokens of prompts and observations that were computed."""
    shared_tokens: int = 0
    """Tokens of prompts that need not be computed: in the shared prefix, or in an identical prompt."""
    peak_live: int = 0
    """Sequences that held a slot at once."""
    forward_calls: int = 0
    busy_s: float = 0.0
    """Seconds inside steps."""


@dataclass(eq=False)
class Request:
    """One call of ``generate`` that waits for its tokens."""

    ids: list[int]
    params: SamplingParams
    limit: int
    future: asyncio.Future[TokenOutput]


@dataclass(eq=False)
class Row:
    """A session: its tokens, and where their keys and values are."""

    session: str
    order: int
    """Order of first arrival."""
    known: list[int] = field(default_factory=list)
    """What the next call's ids must begin with."""
    cached: int = 0
    """Tokens whose keys and values are in the prefix and the slot, as of the last turn's end."""
    shared: bool = False
    slot: int = -1
    request: Request | None = None
    dropped: bool = False
    """Cancelled or released in the midst of a turn: leaves the batch at the next step."""


@dataclass(eq=False)
class Joining:
    """Rows whose new tokens are being computed, in the slots behind the decoding rows."""

    first: int
    leaders: list[Row]
    pending: list[list[int]]
    """For each leader, the tokens that are not cached."""
    followers: list[Row]
    """Newcomers with the same ids as a leader: they copy its keys and values."""
    led_by: list[int]
    """For each follower, its leader's index."""
    at: int = 0
    """The leader whose tokens come next, and how many of them are done."""
    offset: int = 0
    logits: list[Tensor] = field(default_factory=list)


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
        self._kv = KVSlots(model, kv_budget_mb, max_live, max_context)
        if self._kv.slots_without_prefix < 1:
            needed = -(-self._kv.token_bytes * max_context // (1 << 20))
            raise ConfigError(
                f"engine.kv_budget_mb = {kv_budget_mb} does not hold one sequence of {max_context} tokens: "
                f"give at least {needed}, or make rollout.max_context smaller"
            )
        self._model = model
        self._vocab: int = model.config.vocab_size
        self.max_context, self.prefill_chunk, self.deterministic = max_context, prefill_chunk, deterministic
        self.policy_version = 0
        self.stats = Stats()
        self._stops = StopStrings(decode, self._vocab, self._kv.device)
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals = self._held = 0
        self._reset()

    def _reset(self) -> None:
        self._sessions: dict[str, Row] = {}
        self._queue: list[Row] = []
        self._active: list[Row] = []  # the row in slot i, for the decoding rows and then the joining ones
        self._joining: Joining | None = None
        self._parked: dict[int, Row] = {}

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

    def weights_updated(self) -> None:
        """The weights have changed: everything that was computed with the old ones is forgotten.

        Raises:
            InvariantError: a session is live.
        """
        if self._sessions:
            raise InvariantError(f"weights updated while {len(self._sessions)} sessions are live; release them first")
        self.policy_version += 1
        self._kv.forget_prefix()
        self._reset()

    def _drop(self, row: Row) -> None:
        row.dropped = True
        if row in self._queue:
            self._queue.remove(row)
        if self._parked.get(row.slot) is row:
            del self._parked[row.slot]

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
        self._kv.forget_prefix()
        self._reset()
        for request in waiting:
            if not request.future.done():
                request.future.set_exception(error)

    @torch.inference_mode()
    def _step(self) -> bool:
        """One forward pass, or False where nothing can run."""
        began = time.perf_counter()
        if self._joining is None:
            for slot in range(len(self._active) - 1, -1, -1):
                if self._active[slot].dropped:
                    self._leave(slot)
            self._admit()
        if self._joining is not None:
            self._prefill(self._joining)
        elif self._active:
            self._decode()
        else:
            return False
        self.stats.busy_s += time.perf_counter() - began
        return True

    # Who joins

    def _admit(self) -> None:
        ready = self._ready()
        if not ready:
            return
        self._held += 1
        if self._active and self._held <= GATHER_STEPS and len(ready) < GATHER_SHARE * len(self._active):
            return
        self._held = 0
        joins = set(ready)
        self._queue = [row for row in self._queue if row not in joins]
        self._joining = self._seat(ready)
        self.stats.peak_live = max(self.stats.peak_live, len(self._active) + len(self._parked))

    def _ready(self) -> list[Row]:
        """Requests that can join now, in order. Those who hold a slot always can; newcomers take the free slots, and
        one that does not fit (too few slots, or slots too short for want of the prefix) holds up those behind it."""
        if not self._queue:
            return []
        if self.deterministic:
            if self._active or any(row.request is None for row in self._parked.values()):
                return []
            self._queue.sort(key=lambda row: row.order)
        if not self._active and not self._parked:
            self._lay_out()
        free = self._kv.slots - len(self._active) - len(self._parked)
        ready, blocked = [], False
        for row in self._queue:
            if row.slot >= 0:
                ready.append(row)
            elif not blocked:
                row.shared = self._kv.shares_prefix(self._request(row).ids)
                blocked = free < 1 or not (row.shared or self._kv.length >= self.max_context)
                if not blocked:
                    free -= 1
                    ready.append(row)
        return ready

    @staticmethod
    def _request(row: Row) -> Request:
        if row.request is None:
            raise InvariantError(f"session {row.session!r} is in the batch without a request")
        return row.request

    def _lay_out(self) -> None:
        """Nothing is cached: choose the prefix that the waiting prompts share."""
        prompts = [self._request(row).ids for row in self._queue]
        low, high = min(prompts), max(prompts)  # what these two share, all share: lists order by their first difference
        most = min(map(len, prompts)) - 1  # a prompt's last token must be computed: its logits are asked for
        common = next((i for i in range(most) if low[i] != high[i]), max(most, 0))
        if low == high or common < MIN_PREFIX:
            common = 0  # copies of one prompt share by copying: what comes later is likely to share less of it
        kept = self._kv.prefix_ids
        keeps = len(kept) <= most and kept == low[: len(kept)] == high[: len(kept)] and len(kept) >= KEEP_SHARE * common
        if self._kv.slots and keeps and not self.deterministic:
            return
        calls = self._kv.lay_out(low[:common], self.prefill_chunk)
        self.stats.forward_calls += calls
        self.stats.prefilled_tokens += common
        self._turns = Turns(self._kv.slots, self.max_context, self._kv.device)

    def _seat(self, ready: list[Row]) -> Joining:
        """Put the rows that join behind the decoding ones, longest first, copies of a prompt last."""
        leaders: list[Row] = []
        followers: list[Row] = []
        leader_of: dict[tuple[int, ...], Row] = {}
        led: list[Row] = []
        for row in ready:
            if row.slot < 0:
                row.cached = len(self._kv.prefix_ids) if row.shared else 0
                self.stats.shared_tokens += row.cached
                leader = leader_of.setdefault(tuple(self._request(row).ids), row)
                if leader is not row:
                    followers.append(row)
                    led.append(leader)
                    self.stats.shared_tokens += len(self._request(row).ids) - row.cached
                    continue
            leaders.append(row)
        leaders.sort(key=lambda row: row.cached - len(self._request(row).ids))
        place = {id(row): i for i, row in enumerate(leaders)}
        first = len(self._active)
        for row in leaders + followers:
            self._place(row, len(self._active))
            self._active.append(row)
        pending = [self._request(row).ids[row.cached :] for row in leaders]
        return Joining(first, leaders, pending, followers, [place[id(row)] for row in led])

    def _place(self, row: Row, target: int) -> None:
        """Bring a row to the slot ``target``, moving the parked row that may be there."""
        other = None if row.slot == target else self._parked.pop(target, None)
        if row.slot >= 0:
            del self._parked[row.slot]
        if other:
            # A newcomer is admitted only while a slot is free, and none below the target is.
            room = row.slot if row.slot >= 0 else self._free_slot(above=target)
            if row.slot >= 0:
                self._kv.swap(room, target, max(self._own(row), self._own(other)))
            else:
                self._kv.copy(target, room, self._own(other))
            other.slot = room
            self._parked[room] = other
        elif row.slot not in (-1, target):
            self._kv.copy(row.slot, target, self._own(row))
        row.slot = target

    def _free_slot(self, above: int) -> int:
        return next(slot for slot in range(self._kv.slots - 1, above, -1) if slot not in self._parked)

    def _own(self, row: Row) -> int:
        """Tokens of a parked row in its slot."""
        return row.cached - (len(self._kv.prefix_ids) if row.shared else 0)

    # Forward passes

    def _prefill(self, join: Joining) -> None:
        """The next piece of the joining rows' tokens: whole rows, or a part of one that is longer than a piece."""
        counts: list[int] = []
        ids: list[int] = []
        for pending in join.pending[join.at :]:
            left = len(pending) - (0 if counts else join.offset)
            padded = max([left, *counts[:1]]) * (len(counts) + 1)  # rows come longest first
            if counts and (len(ids) + left > self.prefill_chunk or padded > PAD_FACTOR * self.prefill_chunk):
                break
            start = len(pending) - left
            counts.append(min(left, self.prefill_chunk))
            ids += pending[start : start + counts[-1]]
        rows = join.leaders[join.at : join.at + len(counts)]
        own = [self._own(row) for row in rows]
        own[0] += join.offset
        device = self._kv.device
        shared_R = None if all(row.shared for row in rows) else torch.tensor([row.shared for row in rows]).to(device)
        logits_RV = self._kv.forward(
            join.first + join.at, torch.tensor(ids).to(device), counts, torch.tensor(own).to(device), shared_R
        )
        self.stats.forward_calls += 1
        self.stats.prefilled_tokens += len(ids)
        if join.offset + counts[0] < len(join.pending[join.at]):
            join.offset += counts[0]
            return
        join.at, join.offset = join.at + len(counts), 0
        join.logits.append(logits_RV)
        if join.at == len(join.leaders):
            self._joined(join)

    def _joined(self, join: Joining) -> None:
        """All joining rows' tokens are in: hand copies to the followers and sample everyone's first token."""
        rows = join.leaders + join.followers
        logits_RV = torch.cat(join.logits)
        own = [len(self._request(row).ids) - (row.cached - self._own(row)) for row in rows]
        if join.followers:
            sources = [join.first + i for i in join.led_by]
            self._kv.copy_many(sources, join.first + len(join.leaders), max(own[i] for i in join.led_by))
            logits_RV = logits_RV[torch.tensor([*range(len(join.leaders)), *join.led_by]).to(self._kv.device)]
        requests = [self._request(row) for row in rows]
        self._turns.begin(
            join.first,
            [request.params for request in requests],
            [request.limit for request in requests],
            own,
            [row.shared for row in rows],
            self._stops,
        )
        self._joining = None
        self._refresh()
        self._sampled(join.first, logits_RV)

    def _decode(self) -> None:
        if self._stale:
            self._refresh()
        ints = self._turns.ints[: len(self._active)]
        shared_R = None if self._all_shared else ints[:, SHARED].bool()
        counts = [1] * len(self._active)
        logits_RV = self._kv.forward(0, ints[:, TOKEN], counts, ints[:, OWN], shared_R)
        ints[:, OWN] += 1
        self.stats.forward_calls += 1
        self._sampled(0, logits_RV)

    def _sampled(self, first: int, logits_RV: Tensor) -> None:
        over = self._turns.sample(first, logits_RV, self._stops, self._filters, self._plain)
        self.stats.sampled_tokens += len(logits_RV)
        # From the last slot down: the row that fills a gap is then one that goes on.
        for slot in reversed(over):
            row = self._active[slot]
            if row.dropped:
                continue
            request = self._request(row)
            finish, tokens = self._turns.verdict(slot, request.params, self._stops)
            if finish is None:
                continue
            logprobs = self._turns.logprobs[slot, : len(tokens)].tolist()
            row.known, row.request = request.ids + tokens, None
            row.cached = len(row.known) - 1  # the last token was never fed
            self._leave(slot)
            self._parked[row.slot] = row
            if not request.future.done():
                request.future.set_result(TokenOutput(tokens, logprobs, finish, self.policy_version))

    def _leave(self, slot: int) -> None:
        """Take a row out of the batch; the last row fills its slot, and it keeps its tokens in that one's."""
        row, last = self._active[slot], self._active.pop()
        if last is not row:
            tokens = int(self._turns.ints[[slot, last.slot], OWN].max())
            self._kv.swap(slot, last.slot, tokens)
            self._turns.move(last.slot, slot)
            self._active[slot] = last
            row.slot, last.slot = last.slot, slot
        self._stale = True

    def _refresh(self) -> None:
        """What all rows of the batch have in common spares work in every step."""
        params = [self._request(row).params for row in self._active]
        self._filters = any(p.top_k > 0 or p.top_p < 1 for p in params)
        self._plain = all(p.temperature == 1 for p in params)
        self._all_shared = all(row.shared for row in self._active)
        self._stale = False
