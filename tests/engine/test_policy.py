"""The sampler against a plain forward pass over each whole sequence, under everything that a batch can do to it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from retool.engine.kv import bytes_per_token
from retool.engine.policy import LocalPolicy
from retool.engine.sampling import fold_seed, uniforms
from retool.errors import ConfigError, InvariantError
from retool.types import Finish, SamplingParams, TokenOutput

VOCAB = 64
CONTEXT = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,  # larger than usual: near-uniform probabilities would hide a wrong mask
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


@dataclass
class Pair:
    """The same weights under our attention and under transformers' own."""

    ours: Any
    plain: Any


def build(kind: str) -> Pair:
    config_class, model_class, extra = KINDS[kind]
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        config = config_class(**SIZES, **extra)
        config._attn_implementation = "eager"
        models.append(model_class(config).eval())
    return Pair(*models)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.set_num_threads(1)
    return build(request.param)


@pytest.fixture(scope="module")
def qwen2() -> Pair:
    torch.set_num_threads(1)
    return build("qwen2")


def spell(ids: list[int]) -> str:
    """Token 0 … 63 as one or two letters, so that strings end inside tokens and span several."""
    return "".join(chr(97 + i % 26) + ("" if i < 26 else chr(97 + i // 26)) for i in ids)


def make(pair: Pair, **options: Any) -> LocalPolicy:
    options = {"max_context": CONTEXT, "kv_budget_mb": 64, "max_live": 16, "prefill_chunk": 64} | options
    return LocalPolicy(pair.ours, decode=spell, **options)


def check(pair: Pair, ids: list[int], params: SamplingParams, output: TokenOutput, context: int = CONTEXT) -> None:
    """The turn as one row of plain transformers would have it, token by token."""
    sequence = ids + output.token_ids
    with torch.inference_mode():
        logits = pair.plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, len(ids) - 1 : -1].float()
    scaled = logits / (params.temperature or 1.0)
    logprobs = scaled.log_softmax(-1)
    for i, token in enumerate(output.token_ids):
        assert abs(float(logprobs[i, token]) - output.logprobs[i]) <= 1e-4, f"token {i}"
        if params.temperature == 0:
            assert float(logprobs[i].max() - logprobs[i, token]) <= 1e-4
            continue
        probs = logprobs[i].double().exp()
        order = sorted(range(VOCAB), key=lambda t, p=probs: -float(p[t]))
        kept = order[: params.top_k or VOCAB]
        mass, total = 0.0, float(probs[kept].sum())
        nucleus = []
        for t in kept:
            if mass >= params.top_p and nucleus:
                break
            nucleus.append(t)
            mass += float(probs[t]) / total
        allowed = torch.zeros(VOCAB, dtype=torch.float64)
        allowed[nucleus] = probs[nucleus]
        cumulative = (allowed / allowed.sum()).cumsum(0)
        u = float(uniforms(torch.tensor([fold_seed(params.seed)]), torch.tensor([i]))[0])
        below = float(cumulative[token - 1]) if token else 0.0
        assert below - 1e-4 <= u <= float(cumulative[token]) + 1e-4, f"token {i}: {below} {u} {cumulative[token]}"
        assert token in nucleus
    limit = min(params.max_tokens, context - len(ids))
    texts = [spell(output.token_ids[: i + 1]) for i in range(len(output.token_ids))]
    ends = [
        t in params.stop_token_ids or any(s in text for s in params.stop)
        for t, text in zip(output.token_ids, texts, strict=True)
    ]
    assert not any(ends[:-1]), "sampled on after the end"
    if output.finish is Finish.STOP:
        assert ends[-1]
    else:
        assert output.finish is Finish.LENGTH and len(output.token_ids) == limit and not ends[-1]


def random_params(rng: random.Random, **fixed: Any) -> SamplingParams:
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.0, 1.5]),
        "top_p": rng.choice([1.0, 1.0, 0.7]),
        "top_k": rng.choice([0, 0, 5]),
        "max_tokens": rng.randint(1, 20),
        "stop": rng.choice([(), ("ab",), ("c", "zzb")]),
        "stop_token_ids": rng.choice([(), (3,), (9, 20, 33)]),
        "seed": rng.choice([rng.randrange(1 << 70), -5, 0]),
    }
    return SamplingParams(**(options | fixed))


async def converse(
    policy: LocalPolicy, pair: Pair, prompt: list[int], session: str, seed: int, turns: int = 3
) -> list[TokenOutput]:
    """One trajectory with pauses of its own between turns; every turn is checked."""
    rng = random.Random(seed)
    ids, outputs = list(prompt), []
    for _ in range(rng.randint(0, 6)):
        await asyncio.sleep(0)
    for _ in range(turns):
        if len(ids) >= CONTEXT:
            break
        params = random_params(rng)
        output = await policy.generate(ids, params, session=session)
        assert output.policy_version == policy.policy_version
        check(pair, ids, params, output)
        outputs.append(output)
        ids = ids + output.token_ids + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 7, 30]))]
        for _ in range(rng.randint(0, 12)):
            await asyncio.sleep(0)
    policy.release(session)
    return outputs


def prompts(rng: random.Random) -> list[list[int]]:
    """A common system prefix, copies, one prompt that is the prefix itself, strangers, and a long one."""
    system = [rng.randrange(VOCAB) for _ in range(20)]
    tails = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(6)]
    own = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 4, 25, 130)]
    return [system + t for t in tails] + [system + tails[0]] * 3 + [system] + own


async def everyone(policy: LocalPolicy, pair: Pair, all_prompts: list[list[int]], seed: int = 0) -> list[Any]:
    return await asyncio.gather(
        *(converse(policy, pair, p, f"s{i}", seed * 1000 + i) for i, p in enumerate(all_prompts))
    )


@pytest.mark.parametrize(
    "options", [{}, {"max_live": 3}, {"prefill_chunk": 16}, {"max_live": 5, "deterministic": True}]
)
def test_equals_plain_forward_under_joins_parks_and_returns(pair: Pair, options: dict[str, Any]) -> None:
    policy = make(pair, **options)
    asyncio.run(everyone(policy, pair, prompts(random.Random(1))))
    assert policy.stats.peak_live <= options.get("max_live", 16)
    assert policy.stats.sampled_tokens > 0 and policy.stats.forward_calls > 0


def test_shared_prefix_is_computed_once(qwen2: Pair) -> None:
    policy = make(qwen2)
    rng = random.Random(2)
    system = [rng.randrange(1, VOCAB) for _ in range(40)]
    tails = [[0, 1], [0, 2], [5]]
    params = SamplingParams(max_tokens=3)

    async def run() -> None:
        outputs = await asyncio.gather(
            *(policy.generate(system + t, params, session=str(i)) for i, t in enumerate(tails))
        )
        for t, output in zip(tails, outputs, strict=True):
            check(qwen2, system + t, params, output)
        # Late: one that begins with the prefix, one that does not, one that is the prefix.
        late = [[*system, 7, 8, 9], [4, 5, 6], list(system)]
        outputs = await asyncio.gather(*(policy.generate(p, params, session=f"l{i}") for i, p in enumerate(late)))
        for p, output in zip(late, outputs, strict=True):
            check(qwen2, p, params, output)

    asyncio.run(run())
    assert policy.stats.prefilled_tokens == 40 + 2 + 2 + 1 + 3 + 3 + 40
    assert policy.stats.shared_tokens == 4 * 40


def test_copies_of_a_prompt_are_computed_once_and_sampled_apart(qwen2: Pair) -> None:
    policy = make(qwen2)
    prompt = list(range(1, 31))

    async def run() -> list[TokenOutput]:
        calls = (policy.generate(prompt, SamplingParams(max_tokens=12, seed=i), session=str(i)) for i in range(8))
        return await asyncio.gather(*calls)

    outputs = asyncio.run(run())
    assert policy.stats.prefilled_tokens == len(prompt)
    assert len({tuple(o.token_ids) for o in outputs}) == 8
    for i, output in enumerate(outputs):
        check(qwen2, prompt, SamplingParams(max_tokens=12, seed=i), output)


def test_a_returning_session_prefills_only_what_is_new(qwen2: Pair) -> None:
    policy = make(qwen2)

    async def run() -> None:
        ids = list(range(1, 21))
        first = await policy.generate(ids, SamplingParams(max_tokens=5), session="a")
        before = policy.stats.prefilled_tokens
        ids = ids + first.token_ids + [3, 4]
        await policy.generate(ids, SamplingParams(max_tokens=5), session="a")
        assert policy.stats.prefilled_tokens - before == 3  # the last sampled token was never fed

    asyncio.run(run())


def test_tokens_do_not_depend_on_the_batch(qwen2: Pair) -> None:
    params = SamplingParams(max_tokens=20, seed=42)
    prompt = [5, 6, 7, 8]

    async def alone() -> list[int]:
        return (await make(qwen2).generate(prompt, params, session="x")).token_ids

    async def in_company() -> list[int]:
        policy = make(qwen2)
        rng = random.Random(3)
        others = [asyncio.create_task(converse(policy, qwen2, p, f"o{i}", i)) for i, p in enumerate(prompts(rng)[:8])]
        for _ in range(5):
            await asyncio.sleep(0)
        output = await policy.generate(prompt, params, session="x")
        await asyncio.gather(*others)
        return output.token_ids

    assert asyncio.run(alone()) == asyncio.run(in_company())


def test_slots_follow_from_the_budget_and_waiting_requests_are_served(qwen2: Pair) -> None:
    token = bytes_per_token(qwen2.ours.config, torch.float32)
    context = (1 << 20) // token // 3  # one MiB holds three sequences without a prefix
    policy = make(qwen2, kv_budget_mb=1, max_context=context)
    system = [i % VOCAB for i in range(context // 2)]

    async def run() -> None:
        async def one(i: int) -> None:
            ids = [*system, i]
            output = await policy.generate(ids, SamplingParams(max_tokens=4, seed=i), session=str(i))
            check(qwen2, ids, SamplingParams(max_tokens=4, seed=i), output, context)
            policy.release(str(i))

        await asyncio.gather(*(one(i) for i in range(12)))
        assert 3 < policy.stats.peak_live <= 5  # the shared half makes room: (3·2 − 1) halves
        assert policy._batch.kv.store.nbytes + policy._batch.kv.prefix.nbytes <= 1 << 20
        # A stranger does not fit the shortened slots while another session lives: it waits until that one goes.
        await policy.generate([*system, 1], SamplingParams(max_tokens=2), session="a")
        stranger = asyncio.create_task(policy.generate([9, 9], SamplingParams(max_tokens=2), session="b"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stranger.done()
        policy.release("a")
        check(qwen2, [9, 9], SamplingParams(max_tokens=2), await stranger, context)

    asyncio.run(run())


def test_a_budget_without_room_for_one_sequence_is_refused(qwen2: Pair) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_budget_mb = 1 .*at least \d+"):
        make(qwen2, kv_budget_mb=1, max_context=10_000)


def test_stops(qwen2: Pair) -> None:
    prompt = [1, 2, 3]

    async def one(params: SamplingParams) -> TokenOutput:
        return await make(qwen2).generate(prompt, params, session="a")

    free = asyncio.run(one(SamplingParams(max_tokens=40, seed=1)))
    assert free.finish is Finish.LENGTH and len(free.token_ids) == len(free.logprobs) == 40
    text = spell(free.token_ids)
    places = [len(spell(free.token_ids[:i])) for i in range(41)]
    for at in range(2, len(text) - 1, 3):
        stop = text[at - 2 : at + 1]
        output = asyncio.run(one(SamplingParams(max_tokens=40, seed=1, stop=("~", stop))))
        end = text.index(stop) + len(stop)
        wanted = next(i for i in range(41) if places[i] >= end)
        assert output.token_ids == free.token_ids[:wanted] and output.finish is Finish.STOP
        assert output.logprobs == pytest.approx(free.logprobs[:wanted], abs=1e-4)
    for token in set(free.token_ids):
        output = asyncio.run(one(SamplingParams(max_tokens=40, seed=1, stop_token_ids=(60, token, 63))))
        wanted = min(i for i, t in enumerate(free.token_ids) if t in (60, token, 63)) + 1
        assert output.token_ids == free.token_ids[:wanted] and output.finish is Finish.STOP


def test_context_limit(qwen2: Pair) -> None:
    policy = make(qwen2)

    async def run() -> None:
        ids = [1] * (CONTEXT - 4)
        output = await policy.generate(ids, SamplingParams(max_tokens=100), session="a")
        assert output.finish is Finish.LENGTH and len(output.token_ids) == 4
        check(qwen2, ids, SamplingParams(max_tokens=100), output)
        full = await policy.generate(ids + output.token_ids, SamplingParams(), session="a")
        assert full == TokenOutput([], [], Finish.LENGTH, 0)

    asyncio.run(run())


def test_misuse_is_told(qwen2: Pair) -> None:
    policy = make(qwen2)

    async def run() -> None:
        output = await policy.generate([1, 2], SamplingParams(max_tokens=4), session="a")
        with pytest.raises(InvariantError, match="do not begin"):
            await policy.generate([1, 3, *output.token_ids], SamplingParams(), session="a")
        with pytest.raises(InvariantError, match="live"):
            policy.weights_updated()
        for ids, params in (([], SamplingParams()), ([1], SamplingParams(max_tokens=0)), ([VOCAB], SamplingParams())):
            with pytest.raises(ValueError, match="session 'b'"):
                await policy.generate(ids, params, session="b")
        twice = asyncio.create_task(policy.generate([4], SamplingParams(), session="c"))
        await asyncio.sleep(0)
        with pytest.raises(InvariantError, match="another"):
            await policy.generate([4], SamplingParams(), session="c")
        await twice

    asyncio.run(run())


def test_new_weights_are_used_and_counted(qwen2: Pair) -> None:
    fresh = build("qwen2")
    policy = make(fresh)
    prompt = list(range(20))

    async def run() -> list[TokenOutput]:
        asked = [
            policy.generate([*prompt, i], SamplingParams(max_tokens=6, temperature=0), session=str(i)) for i in (1, 2)
        ]
        outputs = await asyncio.gather(*asked)
        for i in (1, 2):
            policy.release(str(i))
        return outputs

    asyncio.run(run())
    with torch.no_grad():
        for model in (fresh.ours, fresh.plain):
            for p in model.parameters():
                p.mul_(-0.7)
    policy.weights_updated()
    for i, output in zip((1, 2), asyncio.run(run()), strict=True):
        assert output.policy_version == 1
        check(fresh, [*prompt, i], SamplingParams(max_tokens=6, temperature=0), output)


def test_cancelled_and_released_turns_free_their_slots(qwen2: Pair) -> None:
    policy = make(qwen2, max_live=2)

    async def run() -> None:
        long = SamplingParams(max_tokens=100)
        tasks = [asyncio.create_task(policy.generate([i, 1], long, session=str(i))) for i in range(4)]
        for _ in range(5):
            await asyncio.sleep(0)
        tasks[0].cancel()  # being sampled
        tasks[3].cancel()  # waiting
        policy.release("1")
        assert (await tasks[1]).finish is Finish.ABORT
        check(qwen2, [2, 1], long, await tasks[2])
        for i in (0, 3):
            with pytest.raises(asyncio.CancelledError):
                await tasks[i]
        policy.release("2")
        policy.weights_updated()  # nobody is live
        check(qwen2, [2, 1], long, await policy.generate([2, 1], long, session="2"))

    asyncio.run(run())


def test_serves_one_event_loop_after_another(qwen2: Pair) -> None:
    policy = make(qwen2)
    params = SamplingParams(max_tokens=5)
    first = asyncio.run(policy.generate([1, 2], params, session="a"))

    async def interrupted() -> None:
        task = asyncio.create_task(policy.generate([3], SamplingParams(max_tokens=90), session="gone"))
        await asyncio.sleep(0.005)
        assert not task.done()

    asyncio.run(interrupted())
    ids = [1, 2, *first.token_ids, 9]
    check(qwen2, ids, params, asyncio.run(policy.generate(ids, params, session="a")))


class Failing(torch.nn.Module):
    """Wraps an output head: fails on the n-th call."""

    def __init__(self, inner: torch.nn.Module, at: int):
        super().__init__()
        self.inner, self.at = inner, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("the device is gone")
        out: torch.Tensor = self.inner(x)
        return out


def test_a_failed_step_fails_everyone_who_waits_and_the_next_works(qwen2: Pair) -> None:
    fresh = build("llama")
    fresh.ours.set_output_embeddings(Failing(fresh.ours.get_output_embeddings(), 5))
    policy = make(fresh, max_live=2)

    async def run() -> None:
        calls = (policy.generate([i], SamplingParams(max_tokens=20), session=str(i)) for i in range(4))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(r) for r in results] == ["the device is gone"] * 4
        check(fresh, [1], SamplingParams(), await policy.generate([1], SamplingParams(), session="1"))

    asyncio.run(run())


def test_deterministic_whatever_the_sandbox_takes(qwen2: Pair) -> None:
    """Bit by bit: tokens and log-probabilities, with pauses that differ between the runs."""

    def play(seed: int) -> list[list[TokenOutput]]:
        policy = make(qwen2, deterministic=True, max_live=6)
        pauses = random.Random(seed)

        async def one(i: int, prompt: list[int]) -> list[TokenOutput]:
            rng, ids, outputs = random.Random(i), prompt, []
            for turn in range(1 + i % 4):
                params = SamplingParams(max_tokens=rng.randint(1, 9), seed=i * 10 + turn, stop_token_ids=(7,))
                outputs.append(await policy.generate(ids, params, session=str(i)))
                ids = ids + outputs[-1].token_ids + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 4))]
                await asyncio.sleep(pauses.choice([0, 0, 0.002, 0.006]))
            policy.release(str(i))
            return outputs

        async def run() -> list[list[TokenOutput]]:
            return await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts(random.Random(4)))))

        return asyncio.run(run())

    first = play(1)
    assert first == play(2) == play(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_plain_forward_on_cuda() -> None:
    pair = build("qwen2")
    pair.ours.cuda()
    policy = make(pair, max_live=5)
    asyncio.run(everyone(policy, pair, prompts(random.Random(1))))
