"""One attention function for transformers' own modules, whatever calls them.

transformers lets a model name its attention implementation. Ours (``retool``) hands the projected, rotated queries,
keys and values to the object passed to the model's forward as ``attend=…``, so that one set of modules serves
the learner (``SharedPrefix``, here) and the sampler (the KV slots of ``engine/kv.py``).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "retool"


class Attend(Protocol):
    """What a forward pass brings along to say who attends to whom."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``q`` is ``[1, Hq, N, D]``, ``k`` and ``v`` ``[1, Hkv, N, D]`` over the forward's flat tokens; returns
        ``[1, N, Hq, D]``."""
        ...


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    attend: Attend = kwargs["attend"]
    return attend.attend(module.layer_idx, query, key, value, scaling), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """``attend`` knows who sees whom; transformers need not build a mask."""
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Each key head repeated for its group of query heads: ``[B, Hkv, T, D]`` → ``[B, Hkv·times, T, D]``."""
    if times == 1:
        return x
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d)


class SharedPrefix:
    """Causal attention for ``B`` right-padded rows of ``T`` tokens that all begin with the same ``P`` tokens, which are
    computed once: the flat input is prefix, row 0, row 1, … (``N = P + B·T``).

    Rows see the prefix and themselves, never each other. Padding is at the right end, where causality already keeps
    it out of sight.
    """

    def __init__(self, prefix: int, rows: int, length: int, device: torch.device):
        self.prefix, self.rows, self.length = prefix, rows, length
        ones = torch.ones(length, prefix + length, dtype=torch.bool, device=device)
        self.mask_TK = ones.tril(diagonal=prefix) if prefix else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        p, b, t = self.prefix, self.rows, self.length
        groups = q.shape[1] // k.shape[1]

        def split(x: Tensor) -> tuple[Tensor, Tensor]:
            h, d = x.shape[1], x.shape[3]
            return x[:, :, :p], x[0, :, p:].reshape(h, b, t, d).transpose(0, 1)

        (q_p, q_r), (k_p, k_r), (v_p, v_r) = split(q), split(k), split(v)
        k_p, k_r, v_p, v_r = (repeat_heads(x, groups) for x in (k_p, k_r, v_p, v_r))
        if p:
            k_r = torch.cat([k_p.expand(b, -1, -1, -1), k_r], dim=2)
            v_r = torch.cat([v_p.expand(b, -1, -1, -1), v_r], dim=2)
        out_r = F.scaled_dot_product_attention(
            q_r, k_r, v_r, attn_mask=self.mask_TK, is_causal=not p, scale=scale
        )  # [B, H, T, D]
        out = out_r.transpose(1, 2).reshape(1, b * t, q.shape[1], q.shape[3])
        if p:
            out_p = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, scale=scale)
            out = torch.cat([out_p.transpose(1, 2), out], dim=1)
        return out
