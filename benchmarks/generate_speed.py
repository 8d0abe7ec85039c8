"""Tokens a second of the local engine against ``transformers.generate``: same model, same weights, rounds interleaved.

    python benchmarks/generate_speed.py --threads 2 --batch 64 256

*One turn*: 191-token prompts, of which 167 are a common system prefix, 48 new tokens. *Ragged tool turns*: each
sequence samples 8 to 48 tokens, is shown 25 tokens of observation, and samples 8 to 48 again; for ``generate`` that is
two calls padded to the longest, as its user would write it (no cache between them). Only the tokens that were asked
for count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from retool.engine.policy import LocalPolicy
from retool.types import SamplingParams

VOCAB, SYSTEM, QUESTION, NEW, OBSERVATION = 1024, 167, 24, 48, 25
SHORTEST = 8
"""Sampled tokens of a ragged turn at least."""


def make_model(implementation: str) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = implementation
    return Qwen2ForCausalLM(config).eval()


def random_ids(n: int, rng: random.Random) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(n)]


class Work:
    """The prompts, observations and lengths of one round."""

    def __init__(self, batch: int, rng: random.Random):
        system = random_ids(SYSTEM, rng)
        self.prompts = [system + random_ids(QUESTION, rng) for _ in range(batch)]
        self.observations = [random_ids(OBSERVATION, rng) for _ in range(batch)]
        self.lengths = [[rng.randint(SHORTEST, NEW) for _ in range(batch)] for _ in range(2)]


def generate(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """``new`` tokens for each prompt, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new
    )
    tokens: list[list[int]] = out[:, longest:].tolist()
    return tokens


def theirs_one_turn(model: Any, work: Work) -> int:
    return sum(map(len, generate(model, work.prompts, NEW)))


def theirs_tool_turns(model: Any, work: Work) -> int:
    prompts = work.prompts
    for turn, lengths in enumerate(work.lengths):
        out = generate(model, prompts, max(lengths))
        prompts = [p + o[:n] for p, o, n in zip(prompts, out, lengths, strict=True)]
        if turn == 0:
            prompts = [p + o for p, o in zip(prompts, work.observations, strict=True)]
    return sum(map(sum, work.lengths))


def ours(policy: LocalPolicy, work: Work, ragged: bool) -> int:
    async def one(i: int) -> int:
        ids, sampled = work.prompts[i], 0
        for turn in range(2 if ragged else 1):
            params = SamplingParams(max_tokens=work.lengths[turn][i] if ragged else NEW, seed=2 * i + turn)
            output = await policy.generate(ids, params, session=str(i))
            sampled += len(output.token_ids)
            ids = ids + output.token_ids + work.observations[i]
        policy.release(str(i))
        return sampled

    async def everyone() -> int:
        return sum(await asyncio.gather(*(one(i) for i in range(len(work.prompts)))))

    return asyncio.run(everyone())


def speed(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is shown")
    parser.add_argument("--ours-only", action="store_true", help="leave transformers.generate out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reference, model = make_model("sdpa"), make_model("retool")
    rng = random.Random(0)
    print(f"{'':28}{'ours tok/s':>12}{'generate':>12}{'ratio':>8}")
    for batch in args.batch:
        policy = LocalPolicy(model, decode=str, max_live=batch, max_context=384)
        for name, theirs, ragged in (
            ("one turn", theirs_one_turn, False),
            ("ragged tool turns", theirs_tool_turns, True),
        ):
            figures: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.rounds + 1):
                policy.weights_updated()
                work = Work(batch, rng)
                figures["ours"].append(speed(partial(ours, policy, work, ragged)))
                if not args.ours_only:
                    figures["theirs"].append(speed(partial(theirs, reference, work)))
            mine = statistics.median(figures["ours"][1:])  # the first round warms up
            other = statistics.median(figures["theirs"][1:]) if figures["theirs"] else float("nan")
            print(f"{name + f', batch {batch}':28}{mine:12.0f}{other:12.0f}{mine / other:8.2f}", flush=True)


if __name__ == "__main__":
    main()
