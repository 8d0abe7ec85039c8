"""Turns logits into tokens: one vectorised pass for all rows, random numbers that depend on nothing but the request,
and the search for stop strings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from retool.types import Finish, SamplingParams

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
"""Constants of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), as the signed
integers that torch has."""
MANTISSA = 53
"""Bits of a float64 in [0, 1)."""
QUANTA = float(1 << 44)
"""Probabilities become whole numbers of 2^-44 before they are summed: integers add up the same in any order, so the
cumulative sum is monotone on every device, and the sum of a vocabulary stays exact in float64 (< 2^53)."""
BLOCK = 128
"""Vocabulary entries summed before the search: measured, 0.2 ms instead of 0.95 for 256 rows of 1,024 on two cores."""


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def fold_seed(seed: int) -> int:
    """Any integer as a signed 64-bit one (modulo 2^64)."""
    return ((seed + (1 << 63)) % (1 << 64)) - (1 << 63)


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """One float64 in [0, 1) for each (seed, position in the turn): splitmix64's mixer, twice. int64 in, any device."""
    z = _mix(_mix(seed_B + GOLDEN) + position_B * GOLDEN)
    return ((z >> (64 - MANTISSA)) & ((1 << MANTISSA) - 1)).double() * 2.0**-MANTISSA


def _filter(scaled_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Probabilities after top-k and then top-p (nucleus, Holtzman et al. 2020: the fewest tokens that hold at least
    ``top_p``), not renormalised; equal logits are kept in the order of their ids."""
    vocab = scaled_BV.shape[1]
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocab, device=scaled_BV.device)
    limit_B = torch.where(top_k_B > 0, top_k_B, vocab)
    probs_BV = sorted_BV.masked_fill(rank_V >= limit_B[:, None], float("-inf")).softmax(-1)
    before_BV = probs_BV.cumsum(-1, dtype=torch.float64) - probs_BV
    # The first token stays whatever top_p is: nothing stands before it.
    probs_BV = probs_BV.masked_fill((before_BV >= top_p_B[:, None]) & (rank_V > 0), 0.0)
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, probs_BV)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds ``uniform · total``. A token of probability 0
    is never drawn, also for a uniform just under 1. A row sums to at most 2^9 and has an entry ≥ 2^-44.

    Looks for the block of the vocabulary first, then inside it: the cumulative sum is short."""
    rows, vocab = probs_BV.shape
    steps_BV = (probs_BV * QUANTA).long()
    if vocab % BLOCK:
        steps_BV = nn.functional.pad(steps_BV, (0, BLOCK - vocab % BLOCK))
    steps_BKW = steps_BV.view(rows, -1, BLOCK)
    end_BK = steps_BKW.sum(-1).cumsum(-1)
    target_B1 = (uniform_B * end_BK[:, -1]).long()[:, None]
    block_B1 = torch.searchsorted(end_BK, target_B1, right=True)
    inside_BW = steps_BKW.gather(1, block_B1[:, :, None].expand(rows, 1, BLOCK))[:, 0].cumsum(-1)
    left_B1 = target_B1 - (end_BK.gather(1, block_B1) - inside_BW[:, -1:])
    return (block_B1 * BLOCK + torch.searchsorted(inside_BW, left_B1, right=True))[:, 0]


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    uniform_B: Tensor,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    *,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw a token a row from float32 logits. Returns ``(token_B, logprob_B)``, int64 and float32.

    ``logprob_B`` is log softmax(logits / temperature) before any filter; rows of temperature 0 take the largest logit
    and are not scaled. Filters cost a sort, of the rows that ask for one only. ``plain`` promises temperature 1."""
    greedy_B = None
    if not plain:
        greedy_B = temperature_B == 0
        logits_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    logprobs_BV = logits_BV.log_softmax(-1)
    probs_BV = logprobs_BV.exp()
    if top_k_B is not None and top_p_B is not None:
        asked = ((top_k_B > 0) | (top_p_B < 1)).nonzero()[:, 0]
        probs_BV[asked] = _filter(logits_BV[asked], top_k_B[asked], top_p_B[asked])
    token_B = draw(probs_BV, uniform_B)
    if greedy_B is not None:
        token_B = torch.where(greedy_B, logits_BV.argmax(-1), token_B)
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


UNKNOWN, NO, MAYBE = 0, 1, 2
SLACK = 4
"""A tail cut inside a character of several bytes decodes its first bytes wrongly; UTF-8 has at most 4."""


class StopStrings:
    """Finds where a stop string is completed, decoding as little as possible.

    Only a token whose own text holds the last character of a stop string can complete one, so a table over the
    vocabulary, filled as tokens turn up, tells on the device which rows need a closer look. It asks of ``decode`` that
    a token's text does not change with what stands before it, but for white space at its edges and for characters
    cut in the middle."""

    def __init__(self, decode: Callable[[list[int]], str], vocab: int, device: torch.device):
        self.decode, self.vocab, self.device = decode, vocab, device
        self.stops: list[tuple[str, ...]] = [()]
        self.table_KV = torch.full((1, vocab), NO, dtype=torch.int8, device=device)

    def index(self, stop: tuple[str, ...]) -> int:
        """The row of ``table_KV`` for these strings (0 for none); empty strings never stop."""
        stop = tuple(s for s in stop if s)
        if stop not in self.stops:
            self.stops.append(stop)
            fresh = torch.full((1, self.vocab), UNKNOWN, dtype=torch.int8, device=self.device)
            self.table_KV = torch.cat([self.table_KV, fresh])
        return self.stops.index(stop)

    def completes(self, index: int, tokens: list[int]) -> bool:
        """Whether the last of a turn's tokens completes a stop string that none before it completed."""
        stop = self.stops[index]
        if not stop or not tokens or not self._maybe(index, stop, tokens[-1]):
            return False
        needed = max(map(len, stop)) + len(self.decode(tokens[-1:])) + SLACK
        window = needed
        text = self.decode(tokens[-window:])
        while len(text) < needed and window < len(tokens):
            window *= 2  # tokens may be empty text, or parts of a character
            text = self.decode(tokens[-window:])
        return any(s in text for s in stop)

    def _maybe(self, index: int, stop: tuple[str, ...], token: int) -> bool:
        known = int(self.table_KV[index, token])
        if known == UNKNOWN:
            text = self.decode([token])
            fits = "\ufffd" in text or any(s[-1].isspace() or s[-1] in text for s in stop)
            known = MAYBE if fits else NO
            self.table_KV[index, token] = known
        return known == MAYBE


TOKEN, OWN, COUNT, LIMIT, SEED, STOPS, SHARED, TOP_K, FIELDS = range(9)
"""Columns of the table of turns: the next token to feed, tokens in the slot, tokens sampled in this turn and their
limit, seed, row of the stop-string table, whether the slot goes on from the shared prefix, top-k."""


class Turns:
    """The turns being sampled, one line a slot, so that a step has no work per row in Python."""

    def __init__(self, slots: int, max_context: int, device: torch.device):
        self.ints = torch.zeros(slots, FIELDS, dtype=torch.long, device=device)
        self.reals = torch.ones(slots, 2, device=device)  # temperature, top-p
        self.stop_ids = torch.full((slots, 1), -1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(slots, max_context, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, max_context, device=device)
        self.device = device

    def begin(
        self,
        first: int,
        params: list[SamplingParams],
        limits: list[int],
        own: list[int],
        shared: list[bool],
        stops: StopStrings,
    ) -> None:
        """Write the lines of the slots ``first``, ``first + 1``, …, whose turns begin."""
        ints = [
            [0, own[i], 0, limits[i], fold_seed(p.seed), stops.index(p.stop), int(shared[i]), p.top_k]
            for i, p in enumerate(params)
        ]
        width = max(self.stop_ids.shape[1], *(len(p.stop_token_ids) for p in params))
        self.stop_ids = nn.functional.pad(self.stop_ids, (0, width - self.stop_ids.shape[1]), value=-1)
        stop_ids = [[*p.stop_token_ids, *[-1] * (width - len(p.stop_token_ids))] for p in params]
        here = slice(first, first + len(params))
        self.ints[here] = torch.tensor(ints).to(self.device)
        self.reals[here] = torch.tensor([[p.temperature, p.top_p] for p in params]).to(self.device)
        self.stop_ids[here] = torch.tensor(stop_ids, dtype=torch.long).to(self.device)

    def move(self, source: int, target: int) -> None:
        """One slot's line over another's."""
        for table in (self.ints, self.reals, self.stop_ids, self.tokens, self.logprobs):
            table[target] = table[source]

    def sample(self, first: int, logits_RV: Tensor, stops: StopStrings, filters: bool, plain: bool) -> list[int]:
        """Sample a token for each of the slots ``first``, ``first + 1``, …; returns those whose turn may be over (see
        ``verdict``). ``filters``: some row has a top-k or top-p; ``plain``: all have temperature 1."""
        rows = len(logits_RV)
        here = slice(first, first + rows)
        ints, reals = self.ints[here], self.reals[here]
        count_R = ints[:, COUNT].clone()
        top_k, top_p = (ints[:, TOP_K], reals[:, 1]) if filters else (None, None)
        uniform_R = uniforms(ints[:, SEED], count_R)
        token_R, logprob_R = sample(logits_RV, reals[:, 0], uniform_R, top_k, top_p, plain=plain)
        slot_R = torch.arange(first, first + rows, device=self.device)
        self.tokens[slot_R, count_R] = token_R
        self.logprobs[slot_R, count_R] = logprob_R
        ints[:, TOKEN] = token_R
        ints[:, COUNT] += 1
        over_R = (token_R[:, None] == self.stop_ids[here]).any(1) | (ints[:, COUNT] >= ints[:, LIMIT])
        if len(stops.stops) > 1:
            over_R |= stops.table_KV[ints[:, STOPS], token_R] != NO
        found: list[int] = over_R.nonzero()[:, 0].tolist()
        return [first + r for r in found]

    def so_far(self, slot: int) -> tuple[list[int], list[float]]:
        """A slot's tokens and log-probabilities."""
        count = int(self.ints[slot, COUNT])
        return self.tokens[slot, :count].tolist(), self.logprobs[slot, :count].tolist()

    def verdict(self, slot: int, params: SamplingParams, stops: StopStrings) -> tuple[Finish | None, list[int]]:
        """Whether and why a slot's turn is over, and its tokens so far."""
        line: list[int] = self.ints[slot].tolist()
        tokens: list[int] = self.tokens[slot, : line[COUNT]].tolist()
        if tokens[-1] in params.stop_token_ids or stops.completes(line[STOPS], tokens):
            return Finish.STOP, tokens
        return (Finish.LENGTH if line[COUNT] >= line[LIMIT] else None), tokens
