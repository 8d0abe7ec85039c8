"""Random numbers, the draw, its filters, and stop strings."""

from __future__ import annotations

import random

import pytest
import torch

from retool.engine.sampling import BLOCK, StopStrings, Turns, draw, fold_seed, sample, uniforms
from retool.types import Finish, SamplingParams

ALMOST_ONE = 1 - 2.0**-53


def splitmix_uniform(seed: int, position: int) -> float:
    """The same hash in Python's own integers."""
    bits = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & bits) + position * golden) & bits) >> 11) * 2.0**-53


def test_uniforms_are_the_hash_of_seed_and_position() -> None:
    seeds = [0, 1, -1, 5 << 61, -(1 << 63), (1 << 64) + 3, 123456789]
    positions = [0, 1, 2, 17, 100_000, 3, 4]
    got = uniforms(torch.tensor([fold_seed(s) for s in seeds]), torch.tensor(positions)).tolist()
    assert got == [splitmix_uniform(s % (1 << 64), p) for s, p in zip(seeds, positions, strict=True)]


def test_uniforms_are_uniform_and_unrelated_between_neighbours() -> None:
    seeds, positions = torch.arange(400).repeat_interleave(50), torch.arange(50).repeat(400)
    u = uniforms(seeds, positions)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi squared, 19 degrees of freedom, p = 0.001
    grid = u.view(400, 50)
    for a, b in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):
        pairs = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03  # 4 standard errors of 19,600 pairs


@pytest.mark.parametrize("vocab", [3, BLOCK, BLOCK + 1, 5 * BLOCK - 7])
def test_draw_is_the_inverse_cdf(vocab: int) -> None:
    torch.manual_seed(vocab)
    probs = torch.rand(200, vocab).pow(8)
    probs[:, torch.rand(vocab) < 0.4] = 0
    probs[:, vocab // 2] += 1e-3
    u = torch.rand(200, dtype=torch.float64)
    u[:3] = torch.tensor([0.0, ALMOST_ONE, 0.5], dtype=torch.float64)
    tokens = draw(probs, u)
    cumulative = probs.double().cumsum(1)
    at = u * cumulative[:, -1]
    index = torch.arange(200)
    assert (cumulative[index, tokens] >= at - 1e-9).all()
    assert (cumulative[index, tokens] - probs[index, tokens] <= at + 1e-9).all()
    assert (probs[index, tokens] > 0).all()


def test_impossible_tokens_are_never_drawn_at_the_ends() -> None:
    for first, last in ((0, 0), (1, 2), (BLOCK, BLOCK + 5), (2 * BLOCK - 1, 2 * BLOCK - 1)):
        probs = torch.zeros(2, 3 * BLOCK)
        probs[:, first] += 0.3
        probs[:, last] += 0.7
        assert draw(probs, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)).tolist() == [first, last]


def one_of_each(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, draws: int = 4000) -> torch.Tensor:
    """Frequencies over evenly spread uniforms."""
    u = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    rows = logits.expand(draws, -1)
    ones = torch.ones(draws)
    tokens, logprobs = sample(rows, ones * temperature, u, (ones * top_k).long(), ones * top_p)
    assert torch.allclose(logprobs, (logits / (temperature or 1)).log_softmax(-1)[tokens], atol=1e-5)
    return torch.bincount(tokens, minlength=len(logits)) / draws


def test_frequencies_follow_temperature_and_filters() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, float("-inf")])
    for temperature in (0.5, 1.0, 2.0):
        probs = (logits / temperature).softmax(0)
        assert torch.allclose(one_of_each(logits, temperature, 0, 1.0), probs, atol=1e-3)
        kept = torch.tensor([1.0, 1, 0, 1, 0, 0]) * probs
        assert torch.allclose(one_of_each(logits, temperature, 3, 1.0), kept / kept.sum(), atol=1e-3)
    probs = logits.softmax(0)  # 0.44, 0.16, 0.06, 0.27, 0.02
    two = torch.tensor([1.0, 0, 0, 1, 0, 0]) * probs
    assert torch.allclose(one_of_each(logits, 1.0, 0, 0.7), two / two.sum(), atol=1e-3)
    # top-p acts on what top-k left: of two tokens the first holds 0.62 of the mass.
    assert one_of_each(logits, 1.0, 2, 0.6).tolist() == [1, 0, 0, 0, 0, 0]
    assert one_of_each(logits, 1.0, 0, 1e-6).tolist() == [1, 0, 0, 0, 0, 0]
    assert one_of_each(logits, 0.0, 0, 1.0).tolist() == [1, 0, 0, 0, 0, 0]


def test_rows_of_a_mixed_batch_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 300) * 3
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0, 1.3, 1.0])
    top_k, top_p = torch.tensor([0, 0, 5, 0, 0, 40]), torch.tensor([1.0, 1, 1, 0.5, 1, 0.9])
    u = torch.rand(6, dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature, u, top_k, top_p)
    for i in range(6):
        one = slice(i, i + 1)
        token, logprob = sample(logits[one], temperature[one], u[one], top_k[one], top_p[one])
        assert token.item() == tokens[i].item() and abs(logprob.item() - logprobs[i].item()) < 1e-6
    plain_tokens, _ = sample(logits, torch.ones(6), u, plain=True)
    assert plain_tokens[0] == tokens[0]


PIECES = ["a", "b", "ab", "</", "to", "ol>", " ", "\n", "", "x<", "é", "<b"]


def decode(ids: list[int]) -> str:
    """Like a byte-level tokenizer's: ids from 100 on are single bytes."""
    data = b"".join(bytes([i - 100]) if i >= 100 else PIECES[i].encode() for i in ids)
    return data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", [("</tool>",), ("ab", "<b"), ("\n\n",), (" ",), ("é",), ("aé", "bb"), ("", "ba")])
def test_stop_strings_end_at_the_token_that_completes_them(stop: tuple[str, ...]) -> None:
    rng = random.Random(str(stop))
    strings = StopStrings(decode, 356, torch.device("cpu"))
    index = strings.index(stop)
    found = 0
    for _ in range(300):
        alphabet = [*range(len(PIECES)), 100 + 0xC3, 100 + 0xA9, 100 + ord("b")]
        tokens = [rng.choice(alphabet) for _ in range(12)]
        if rng.random() < 0.5:
            tokens[4:4] = [3, 4, 8, 5]
        ends = [any(s and s in decode(tokens[: i + 1]) for s in stop) for i in range(len(tokens))]
        wanted = ends.index(True) if any(ends) else None
        got = next((i for i in range(len(tokens)) if strings.completes(index, tokens[: i + 1])), None)
        assert got == wanted, [decode([t]) for t in tokens]
        found += wanted is not None
    assert found > 20
    assert not strings.completes(strings.index(()), [0, 1])


def test_only_tokens_that_may_complete_a_stop_are_looked_at() -> None:
    calls: list[int] = []

    def counting(ids: list[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    strings = StopStrings(counting, 356, torch.device("cpu"))
    index = strings.index(("</tool>",))
    for _ in range(50):
        assert not strings.completes(index, [0] * 1000)
    assert calls == [1]
    assert not strings.completes(index, [0] * 1000 + [5])
    assert max(calls) < 40, "the tail only"


def test_turns_stop_on_ids_limits_and_move() -> None:
    vocab = 10
    turns = Turns(4, 16, torch.device("cpu"))
    strings = StopStrings(lambda ids: "".join(map(str, ids)), vocab, torch.device("cpu"))
    params = [
        SamplingParams(temperature=0, stop_token_ids=(5, 6)),
        SamplingParams(temperature=0, stop_token_ids=(4,)),
        SamplingParams(temperature=0, stop=("35",)),
    ]
    turns.begin(0, params, [9, 9, 2], [0, 0, 0], [False] * 3, strings)

    def step(tokens: list[int]) -> list[int]:
        logits = torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()
        return turns.sample(0, logits, strings, filters=False, plain=False)

    over = step([3, 3, 3])
    assert [turns.verdict(s, params[s], strings)[0] for s in over] == [None] * len(over)
    over = step([5, 5, 5])
    assert {s: turns.verdict(s, params[s], strings) for s in over} == {
        0: (Finish.STOP, [3, 5]),
        2: (Finish.STOP, [3, 5]),
    }
    turns.move(1, 0)
    assert turns.verdict(0, params[1], strings) == (None, [3, 5])
    assert 0 in step([4, 1, 1]) and turns.verdict(0, params[1], strings) == (Finish.STOP, [3, 5, 4])
