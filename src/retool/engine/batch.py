"""The rows of the sampler's batch: where they stand, and what a forward pass does with them. No asyncio here.

Rows being decoded are kept in the front slots ``[0:n)``, those that join right behind them, and *parked* rows (their
turn ended, their session lives on) anywhere after.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retool.engine.kv import KVSlots
from retool.engine.sampling import OWN, SHARED, TOKEN, StopStrings, Turns
from retool.errors import InvariantError
from retool.types import Finish, SamplingParams, TokenOutput

MIN_PREFIX = 16
"""Shorter common prefixes are not worth a second matrix product."""
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

    @property
    def asked(self) -> Request:
        """The request, where there must be one."""
        if self.request is None:
            raise InvariantError(f"session {self.session!r} is in the batch without a request")
        return self.request


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


@dataclass(frozen=True)
class Ended:
    """A turn that is over."""

    row: Row
    request: Request
    tokens: list[int]
    logprobs: list[float]
    finish: Finish


class Batch:
    """All rows that hold a slot."""

    def __init__(self, kv: KVSlots, stops: StopStrings, chunk: int, stats: Stats):
        self.kv, self.stops, self.chunk, self.stats = kv, stops, chunk, stats
        self.clear()

    def clear(self) -> None:
        """Nobody holds a slot."""
        self.active: list[Row] = []
        """The row in slot i: first those being decoded, then those that join."""
        self.parked: dict[int, Row] = {}
        self.joining: Joining | None = None
        self._stale = True

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self.kv.slots - len(self.active) - len(self.parked)

    @property
    def idle(self) -> bool:
        """Nobody holds a slot."""
        return not self.active and not self.parked

    def step(self) -> list[Ended] | None:
        """One forward pass: a piece of the joining rows' tokens, or one token for every row. Returns the turns that it
        ended; None where there is nothing to do."""
        if self.joining is not None:
            return self._prefill(self.joining)
        return self._decode() if self.active else None

    def leave_dropped(self) -> None:
        """Take cancelled rows out; not while rows are joining."""
        for slot in range(len(self.active) - 1, -1, -1):
            if self.active[slot].dropped:
                self._leave(slot)

    def so_far(self) -> dict[str, tuple[list[int], list[float]]]:
        """By session, the tokens and log-probabilities of the turns that are being decoded."""
        decoding = self.active[: self.joining.first] if self.joining else self.active
        return {row.session: self.turns.so_far(slot) for slot, row in enumerate(decoding) if not row.dropped}

    def unpark(self, row: Row) -> None:
        """The row's session is over: if it is parked, its slot is free."""
        if self.parked.get(row.slot) is row:
            del self.parked[row.slot]

    # Who stands where

    def lay_out(self, prompts: list[list[int]], keep: bool) -> None:
        """Nothing is cached: choose the prefix that the waiting prompts share. ``keep``: the one that is there may stay
        where it does nearly as well."""
        low, high = min(prompts), max(prompts)  # what these two share, all share: lists order by their first difference
        most = min(map(len, prompts)) - 1  # a prompt's last token must be computed: its logits are asked for
        common = next((i for i in range(most) if low[i] != high[i]), max(most, 0))
        if low == high or common < MIN_PREFIX:
            common = 0  # copies of one prompt share by copying: what comes later is likely to share less of it
        kept = self.kv.prefix_ids
        keeps = len(kept) <= most and kept == low[: len(kept)] == high[: len(kept)] and len(kept) >= KEEP_SHARE * common
        if self.kv.slots and keep and keeps:
            return
        calls = self.kv.lay_out(low[:common], self.chunk)
        self.stats.forward_calls += calls
        self.stats.prefilled_tokens += common
        self.turns = Turns(self.kv.slots, self.kv.max_context, self.kv.device)

    def seat(self, ready: list[Row]) -> None:
        """Put the rows that join behind the decoding ones, longest first, copies of a prompt last."""
        leaders: list[Row] = []
        followers: list[Row] = []
        leader_of: dict[tuple[int, ...], Row] = {}
        led: list[Row] = []
        for row in ready:
            if row.slot < 0:
                row.cached = len(self.kv.prefix_ids) if row.shared else 0
                self.stats.shared_tokens += row.cached
                leader = leader_of.setdefault(tuple(row.asked.ids), row)
                if leader is not row:
                    followers.append(row)
                    led.append(leader)
                    self.stats.shared_tokens += len(row.asked.ids) - row.cached
                    continue
            leaders.append(row)
        leaders.sort(key=lambda row: row.cached - len(row.asked.ids))
        place = {id(row): i for i, row in enumerate(leaders)}
        first = len(self.active)
        for row in leaders + followers:
            self._place(row, len(self.active))
            self.active.append(row)
        pending = [row.asked.ids[row.cached :] for row in leaders]
        self.joining = Joining(first, leaders, pending, followers, [place[id(row)] for row in led])
        self.stats.peak_live = max(self.stats.peak_live, len(self.active) + len(self.parked))

    def _place(self, row: Row, target: int) -> None:
        """Bring a row to the slot ``target``, moving the parked row that may be there."""
        other = None if row.slot == target else self.parked.pop(target, None)
        if row.slot >= 0:
            del self.parked[row.slot]
        if other:
            # A newcomer is admitted only while a slot is free, and none below the target is.
            room = row.slot if row.slot >= 0 else self._free_slot(above=target)
            if row.slot >= 0:
                self.kv.swap(room, target, max(self._own(row), self._own(other)))
            else:
                self.kv.copy(target, room, self._own(other))
            other.slot = room
            self.parked[room] = other
        elif row.slot not in (-1, target):
            self.kv.copy(row.slot, target, self._own(row))
        row.slot = target

    def _free_slot(self, above: int) -> int:
        return next(slot for slot in range(self.kv.slots - 1, above, -1) if slot not in self.parked)

    def _own(self, row: Row) -> int:
        """Tokens of a parked row in its slot."""
        return row.cached - (len(self.kv.prefix_ids) if row.shared else 0)

    # Forward passes

    def _prefill(self, join: Joining) -> list[Ended]:
        """The next piece of the joining rows' tokens: whole rows, or a part of one that is longer than a piece."""
        counts: list[int] = []
        ids: list[int] = []
        for pending in join.pending[join.at :]:
            left = len(pending) - (0 if counts else join.offset)
            padded = max([left, *counts[:1]]) * (len(counts) + 1)  # rows come longest first
            if counts and (len(ids) + left > self.chunk or padded > PAD_FACTOR * self.chunk):
                break
            start = len(pending) - left
            counts.append(min(left, self.chunk))
            ids += pending[start : start + counts[-1]]
        rows = join.leaders[join.at : join.at + len(counts)]
        own = [self._own(row) for row in rows]
        own[0] += join.offset
        device = self.kv.device
        shared_R = None if all(row.shared for row in rows) else torch.tensor([row.shared for row in rows]).to(device)
        logits_RV = self.kv.forward(
            join.first + join.at, torch.tensor(ids).to(device), counts, torch.tensor(own).to(device), shared_R
        )
        self.stats.forward_calls += 1
        self.stats.prefilled_tokens += len(ids)
        if join.offset + counts[0] < len(join.pending[join.at]):
            join.offset += counts[0]
            return []
        join.at, join.offset = join.at + len(counts), 0
        join.logits.append(logits_RV)
        return self._joined(join) if join.at == len(join.leaders) else []

    def _joined(self, join: Joining) -> list[Ended]:
        """All joining rows' tokens are in: hand copies to the followers and sample everyone's first token."""
        rows = join.leaders + join.followers
        logits_RV = torch.cat(join.logits)
        own = [len(row.asked.ids) - (row.cached - self._own(row)) for row in rows]
        if join.followers:
            sources = [join.first + i for i in join.led_by]
            self.kv.copy_many(sources, join.first + len(join.leaders), max(own[i] for i in join.led_by))
            logits_RV = logits_RV[torch.tensor([*range(len(join.leaders)), *join.led_by]).to(self.kv.device)]
        requests = [row.asked for row in rows]
        self.turns.begin(
            join.first,
            [request.params for request in requests],
            [request.limit for request in requests],
            own,
            [row.shared for row in rows],
            self.stops,
        )
        self.joining = None
        self._refresh()
        return self._sampled(join.first, logits_RV)

    def _decode(self) -> list[Ended]:
        if self._stale:
            self._refresh()
        ints = self.turns.ints[: len(self.active)]
        shared_R = None if self._all_shared else ints[:, SHARED].bool()
        counts = [1] * len(self.active)
        logits_RV = self.kv.forward(0, ints[:, TOKEN], counts, ints[:, OWN], shared_R)
        ints[:, OWN] += 1
        self.stats.forward_calls += 1
        return self._sampled(0, logits_RV)

    def _sampled(self, first: int, logits_RV: Tensor) -> list[Ended]:
        over = self.turns.sample(first, logits_RV, self.stops, self._filters, self._plain)
        self.stats.sampled_tokens += len(logits_RV)
        ended = []
        # From the last slot down: the row that fills a gap is then one that goes on.
        for slot in reversed(over):
            row = self.active[slot]
            if row.dropped:
                continue
            request = row.asked
            finish, tokens = self.turns.verdict(slot, request.params, self.stops)
            if finish is None:
                continue
            logprobs = self.turns.logprobs[slot, : len(tokens)].tolist()
            row.known, row.request = request.ids + tokens, None
            row.cached = len(row.known) - 1  # the last token was never fed
            self._leave(slot)
            self.parked[row.slot] = row
            ended.append(Ended(row, request, tokens, logprobs, finish))
        return ended

    def _leave(self, slot: int) -> None:
        """Take a row out of the batch; the last row fills its slot, and it keeps its tokens in that one's."""
        row, last = self.active[slot], self.active.pop()
        if last is not row:
            tokens = int(self.turns.ints[[slot, last.slot], OWN].max())
            self.kv.swap(slot, last.slot, tokens)
            self.turns.move(last.slot, slot)
            self.active[slot] = last
            row.slot, last.slot = last.slot, slot
        self._stale = True

    def _refresh(self) -> None:
        """What all rows of the batch have in common spares work in every step."""
        params = [row.asked.params for row in self.active]
        self._filters = any(p.top_k > 0 or p.top_p < 1 for p in params)
        self._plain = all(p.temperature == 1 for p in params)
        self._all_shared = all(row.shared for row in self.active)
        self._stale = False
