"""Slots, prefix and attention over them, against one plain attention a row."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from retool.engine.kv import MIB, KVSlots, Rows, bytes_per_token

HEADS, GROUPS, WIDTH, SLOTS, LENGTH = 2, 3, 8, 6, 20
SCALE = WIDTH**-0.5


def naive(q_H: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query position: ``q_H`` is ``[Hq, D]``, keys and values ``[H, K, D]``."""
    out = []
    for head, q in enumerate(q_H):
        weight = (keys[head // GROUPS] @ q * SCALE).softmax(0)
        out.append(weight @ values[head // GROUPS])
    return torch.stack(out)


@pytest.mark.parametrize("prefix_tokens", [0, 5])
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3, 3], [4, 1, 2], [6]])
def test_rows_attend_to_prefix_and_themselves(prefix_tokens: int, counts: list[int]) -> None:
    torch.manual_seed(len(counts) + prefix_tokens)
    rng = random.Random(3)
    store = torch.randn(2, 2, SLOTS, HEADS, LENGTH, WIDTH)
    prefix = torch.randn(2, 2, HEADS, prefix_tokens, WIDTH) if prefix_tokens else None
    for shared in ([True] * len(counts), [i % 2 == 1 for i in range(len(counts))]):
        start = [rng.randint(0, 9) for _ in counts]
        n = sum(counts)
        q, k, v = (torch.randn(1, h, n, WIDTH) for h in (HEADS * GROUPS, HEADS, HEADS))
        before = store.clone()
        rows = Rows(store, prefix, 2, torch.tensor(start), counts, torch.tensor(shared))
        out = rows.attend(1, q, k, v, SCALE)
        assert out.shape == (1, n, HEADS * GROUPS, WIDTH)
        at = 0
        for r, count in enumerate(counts):
            keys, values = before[0, 1, 2 + r, :, : start[r]], before[1, 1, 2 + r, :, : start[r]]
            if prefix is not None and shared[r]:
                keys, values = torch.cat([prefix[0, 1], keys], 1), torch.cat([prefix[1, 1], values], 1)
            for _ in range(count):
                keys = torch.cat([keys, k[0, :, at : at + 1]], 1)
                values = torch.cat([values, v[0, :, at : at + 1]], 1)
                assert torch.allclose(out[0, at], naive(q[0, :, at], keys, values), atol=1e-5)
                at += 1
            here = slice(start[r], start[r] + count)
            assert torch.equal(store[0, 1, 2 + r, :, here], k[0, :, at - count : at])
            before[:, 1, 2 + r, :, here] = store[:, 1, 2 + r, :, here]
        assert torch.equal(store, before), "wrote where it should not"


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


def test_layout_follows_from_the_budget(model: Qwen2ForCausalLM) -> None:
    token = bytes_per_token(model.config, torch.float32)
    assert token == 2 * 2 * 2 * 4 * 4
    kv = KVSlots(model, 1, max_live=1000, max_context=64)
    whole = MIB // (token * 64)
    assert kv.slots_without_prefix == whole
    kv.lay_out([], 16)
    assert (kv.slots, kv.length) == (whole, 64)
    with torch.inference_mode():
        calls = kv.lay_out([1] * 40, 16)
    assert calls == 3 and kv.length == 24 and kv.slots > 2 * whole
    assert kv.prefix is not None and kv.store.nbytes + kv.prefix.nbytes <= MIB
    few = KVSlots(model, 1, max_live=4, max_context=64)
    with torch.inference_mode():
        few.lay_out([1] * 40, 16)
    assert (few.slots, few.length) == (4, 64), "with room for all, slots stay long enough for strangers"


def test_shares_prefix_needs_a_token_after_it(model: Qwen2ForCausalLM) -> None:
    kv = KVSlots(model, 1, max_live=4, max_context=64)
    assert not kv.shares_prefix([1, 2])
    with torch.inference_mode():
        kv.lay_out([1, 2, 3], 16)
    assert kv.shares_prefix([1, 2, 3, 4])
    assert not kv.shares_prefix([1, 2, 3]) and not kv.shares_prefix([1, 2, 4, 4])
    kv.forget_prefix()
    assert not kv.shares_prefix([1, 2, 3, 4])


def test_forward_after_copies_and_swaps_equals_the_whole_sequence(model: Qwen2ForCausalLM) -> None:
    def plain(ids: list[int]) -> Tensor:
        whole = torch.arange(len(ids))
        rows = Rows(torch.zeros(2, 2, 1, 2, len(ids), 4), None, 0, torch.tensor([0]), [len(ids)])
        out: Tensor = kv._run(torch.tensor(ids), whole, rows, slice(-1, None))
        return out[0]

    kv = KVSlots(model, 1, max_live=5, max_context=64)
    with torch.inference_mode():
        kv.lay_out([9, 8, 7, 6], 3)
        a, b = [1, 2, 3, 4, 5], [11, 12]
        first = kv.forward(0, torch.tensor(a + b), [5, 2], torch.tensor([0, 0]), None)
        assert torch.allclose(first[0], plain([9, 8, 7, 6, *a]), atol=1e-5)
        assert torch.allclose(first[1], plain([9, 8, 7, 6, *b]), atol=1e-5)
        kv.swap(0, 1, 5)
        kv.copy(1, 4, 5)
        kv.copy_many([0, 4], 2, 5)  # slots now: b, a, b, a, a
        shared = torch.tensor([True] * 5)
        out = kv.forward(0, torch.tensor([20, 21, 22, 23, 24]), [1] * 5, torch.tensor([2, 5, 2, 5, 5]), shared)
    for got, ids, token in zip(out, (b, a, b, a, a), range(20, 25), strict=True):
        with torch.inference_mode():
            assert torch.allclose(got, plain([9, 8, 7, 6, *ids, token]), atol=1e-5)
