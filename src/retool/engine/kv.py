"""The sampler's memory of keys and values, and attention over it.

A *slot* holds the keys and values of one sequence, less the tokens of a prefix that the sequences share: the prefix is
stored once, and attention over it is one matrix product for all rows (the idea of cascade inference). The rows
of a forward pass are consecutive slots, so that attention reads views and never gathers.

The tensors end in ``[…, S, H, T, D]`` here: S slots, H key heads, T tokens of a slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retool.engine.attention import NAME

MIB = 1 << 20
NEVER = -1e30
"""Added to a score that must get no weight: finite, so that a difference of two never is NaN."""


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of KV cache that one token takes: 2 · layers · key heads · head width · bytes of a number."""
    layers, heads, width = _sizes(config)
    return 2 * layers * heads * width * dtype.itemsize


def _sizes(config: Any) -> tuple[int, int, int]:
    heads: int = config.num_key_value_heads
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width


class Rows:
    """Attention for R consecutive slots, of which row r brings ``counts[r]`` new tokens (see ``attention.Attend``).

    The forward's flat tokens are row 0's new tokens, row 1's, … (``N = Σ counts``). Their keys and values are written
    into the slots behind the ``start_R[r]`` tokens that the row has there, then every new token attends to the prefix
    (rows with ``shared_R``), to its row's earlier tokens and to itself.
    """

    def __init__(
        self,
        store: Tensor,
        prefix: Tensor | None,
        first: int,
        start_R: Tensor,
        counts: list[int],
        shared_R: Tensor | None = None,
    ):
        """``store`` is ``[2, L, S, H, T, D]`` (keys, then values), ``prefix`` ``[2, L, H, P, D]`` or None;
        ``shared_R`` None: every row begins with the prefix."""
        device = store.device
        rows = len(counts)
        self.first, self.rows, self.longest = first, rows, max(counts)
        self.store, self.prefix = store, prefix
        self.even = min(counts) == self.longest
        row_R = torch.arange(rows, device=device)
        if self.longest == 1:
            self.row_N, self.step_N = row_R, torch.zeros(1, dtype=torch.long, device=device)
        else:
            count_R = torch.tensor(counts, device=device)
            self.row_N = row_R.repeat_interleave(count_R)
            self.step_N = torch.arange(sum(counts), device=device) - (count_R.cumsum(0) - count_R)[self.row_N]
        self.slot_N = self.row_N + first
        self.own_N = start_R[self.row_N] + self.step_N if self.longest > 1 else start_R
        self.reach = int(self.own_N.max()) + 1
        last_RQ = start_R[:, None] + torch.arange(self.longest, device=device)
        self.hidden_RQK = torch.arange(self.reach, device=device) > last_RQ[:, :, None]
        self.alone_R = None if prefix is None or shared_R is None or bool(shared_R.all()) else ~shared_R
        p = 0 if prefix is None else prefix.shape[3]
        if self.longest == 1:
            self.bias_R11K = torch.zeros(rows, 1, 1, self.reach, dtype=store.dtype, device=device)
            self.bias_R11K.masked_fill_(self.hidden_RQK[:, None], NEVER)
        else:
            seen = torch.ones(rows, 1, self.longest, p + self.reach, dtype=torch.bool, device=device)
            seen[:, 0, :, p:] = ~self.hidden_RQK
            if p and self.alone_R is not None:
                seen[self.alone_R, :, :, :p] = False
            self.seen_R1QK = seen

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self.store[0, layer], self.store[1, layer]
        keys[self.slot_N, :, self.own_N] = k[0].transpose(0, 1)
        values[self.slot_N, :, self.own_N] = v[0].transpose(0, 1)
        keys = keys[self.first : self.first + self.rows, :, : self.reach]
        values = values[self.first : self.first + self.rows, :, : self.reach]
        if self.longest == 1:
            return self._one(layer, q, keys, values, scale)
        return self._many(layer, q, keys, values, scale)

    def _one(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """One new token a row. One softmax over the scores of prefix and slot together."""
        r, h, t, d = keys.shape
        g = q.shape[1] // h
        q_HN = (q * scale).reshape(h, g * r, d)
        q_RH = q_HN.view(h, g, r, d).permute(2, 0, 1, 3).reshape(r * h, g, d)
        score = torch.bmm(q_RH, keys.reshape(r * h, t, d).transpose(1, 2)).view(r, h, g, t) + self.bias_R11K
        if self.prefix is None:
            weight = score.softmax(-1, dtype=torch.float32).to(values.dtype)
            out = torch.bmm(weight.view(r * h, g, t), values.reshape(r * h, t, d))
            return out.view(1, r, h * g, d)
        p_keys, p_values = self.prefix[0, layer], self.prefix[1, layer]
        p = p_keys.shape[1]
        p_score = torch.bmm(q_HN, p_keys.transpose(1, 2)).view(h, g, r, p).permute(2, 0, 1, 3)
        if self.alone_R is not None:
            p_score = p_score.masked_fill(self.alone_R[:, None, None, None], NEVER)
        weight = torch.cat([p_score, score], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
        p_weight = weight[..., :p].permute(1, 2, 0, 3).reshape(h, g * r, p)
        p_out = torch.bmm(p_weight, p_values).view(h, g, r, d).permute(2, 0, 1, 3)
        out = torch.bmm(weight[..., p:].reshape(r * h, g, t), values.reshape(r * h, t, d)).view(r, h, g, d)
        return (out + p_out).reshape(1, r, h * g, d)

    def _many(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Rows padded to the longest; what padding computes is dropped."""
        r, h, _, d = keys.shape
        hq, n = q.shape[1], q.shape[2]
        q_N = q[0].transpose(0, 1)
        if self.even:
            q_RQ = q_N.reshape(r, self.longest, hq, d)
        else:
            q_RQ = q.new_zeros(r, self.longest, hq, d)
            q_RQ[self.row_N, self.step_N] = q_N
        keys, values = (self._with_prefix(layer, i, x, hq // h) for i, x in enumerate((keys, values)))
        out = nn.functional.scaled_dot_product_attention(
            q_RQ.transpose(1, 2), keys, values, attn_mask=self.seen_R1QK, scale=scale
        )
        out = out.transpose(1, 2)
        return out.reshape(1, n, hq, d) if self.even else out[self.row_N, self.step_N][None]

    def _with_prefix(self, layer: int, which: int, own: Tensor, g: int) -> Tensor:
        """The prefix and the slots' tokens, each key head repeated for its g query heads."""
        r, h, t, d = own.shape
        if self.prefix is None:
            return own[:, :, None].expand(r, h, g, t, d).reshape(r, h * g, t, d)
        shared = self.prefix[which, layer]
        p = shared.shape[1]
        both = own.new_empty(r, h, g, p + t, d)
        both[..., :p, :] = shared[None, :, None]
        both[..., p:, :] = own[:, :, None]
        return both.view(r, h * g, p + t, d)


class KVSlots:
    """A model, its slots, and the forward pass through both."""

    def __init__(self, model: Any, budget_mb: int, max_live: int, max_context: int):
        self.model = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        model.config._attn_implementation = NAME
        self.token_bytes = bytes_per_token(model.config, self.dtype)
        self.budget, self.max_live, self.max_context = budget_mb * MIB, max_live, max_context
        self.prefix_ids: list[int] = []
        self.prefix: Tensor | None = None
        self.slots, self.length = 0, 0
        self.store = torch.empty(0)
        # transformers builds no mask of its own where it is given one of four dimensions; ``Rows`` needs none.
        self.no_mask = torch.zeros(1, 1, 1, 1, device=self.device, dtype=self.dtype)

    @property
    def slots_without_prefix(self) -> int:
        """Sequences of ``max_context`` tokens that the budget holds when nothing is shared."""
        return min(self.max_live, self.budget // (self.token_bytes * self.max_context))

    def lay_out(self, prefix_ids: list[int], chunk: int) -> int:
        """Forget everything, choose the number and the length of slots for sequences that share ``prefix_ids`` (may be
        empty), and compute the prefix in pieces of ``chunk`` tokens. Returns the number of forward passes.

        Slots are shortened by the prefix only where that makes room for more sequences."""
        p = len(prefix_ids)
        slots, length = self.slots_without_prefix, self.max_context
        if p and slots < self.max_live:
            length = self.max_context - p
            slots = min(self.max_live, (self.budget - p * self.token_bytes) // (length * self.token_bytes))
        if (slots, length) != (self.slots, self.length):
            layers, heads, width = _sizes(self.model.config)
            self.store = torch.empty(0)  # the old slots go before the new ones come
            # Zeros, for a weight of zero times memory that was never written could be NaN.
            self.store = torch.zeros(2, layers, slots, heads, length, width, device=self.device, dtype=self.dtype)
            self.slots, self.length = slots, length
        self.forget_prefix()
        if not p:
            return 0
        layers, heads, width = _sizes(self.model.config)
        store = torch.zeros(2, layers, 1, heads, p, width, device=self.device, dtype=self.dtype)
        starts = range(0, p, chunk)
        for start in starts:
            ids = torch.tensor(prefix_ids[start : start + chunk], device=self.device)
            start_R = torch.tensor([start], device=self.device)
            rows = Rows(store, None, 0, start_R, [len(ids)])
            self._run(ids, start + torch.arange(len(ids), device=self.device), rows, slice(-1, None))
        self.prefix, self.prefix_ids = store[:, :, 0], list(prefix_ids)
        return len(starts)

    def forward(self, first: int, ids_N: Tensor, counts: list[int], own_R: Tensor, shared_R: Tensor | None) -> Tensor:
        """Feed ``counts[r]`` tokens to each of the slots ``first``, ``first + 1``, …, which hold ``own_R`` tokens.

        ``shared_R`` (bool) tells the rows that begin with the prefix; None: all. Returns float32 logits after each
        row's last new token, ``[R, V]``."""
        rows = Rows(self.store, self.prefix, first, own_R, counts, shared_R)
        position_N = rows.own_N
        if self.prefix is not None:
            p = len(self.prefix_ids)
            position_N = position_N + (p if shared_R is None else p * shared_R[rows.row_N])
        if rows.longest == 1:
            return self._run(ids_N, position_N, rows, slice(None))
        last_R = torch.tensor(counts, device=self.device).cumsum(0) - 1
        return self._run(ids_N, position_N, rows, last_R)

    def _run(self, ids_N: Tensor, position_N: Tensor, rows: Rows, keep: slice | Tensor) -> Tensor:
        out = self.model.base_model(
            input_ids=ids_N[None],
            position_ids=position_N[None],
            attention_mask=self.no_mask,
            use_cache=False,
            attend=rows,
        )
        logits: Tensor = self.model.get_output_embeddings()(out.last_hidden_state[0, keep])
        return logits.float()

    def shares_prefix(self, ids: list[int]) -> bool:
        """Whether ``ids`` begin with the prefix and go on after it."""
        p = len(self.prefix_ids)
        return 0 < p < len(ids) and ids[:p] == self.prefix_ids

    def forget_prefix(self) -> None:
        """The weights changed, or a pass failed."""
        self.prefix, self.prefix_ids = None, []

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first ``tokens`` tokens of one slot, over another's."""
        self.store[:, :, target, :, :tokens] = self.store[:, :, source, :, :tokens]

    def copy_many(self, sources: list[int], first: int, tokens: int) -> None:
        """The first ``tokens`` tokens of the slots ``sources`` over the slots ``first``, ``first + 1``, …"""
        index = torch.tensor(sources, device=self.device)
        self.store[:, :, first : first + len(sources), :, :tokens] = self.store[:, :, index, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` tokens of two slots."""
        held = self.store[:, :, a, :, :tokens].clone()
        self.copy(b, a, tokens)
        self.store[:, :, b, :, :tokens] = held
