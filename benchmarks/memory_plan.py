"""The memory that ``--dry-run`` estimates for learning, against what a training step takes on this machine's CPU.

Each case is a process of its own: a model with random weights, a small step that makes the optimiser's moments, then
one step of two micro-batches, so that the second one's backward pass meets the gradients of the first. Taken is the
peak of the process over what it held before the model was there, when all libraries were loaded and used. KV caches
are left out: fresh ones take no memory on a CPU. Cases marked as fitted are those by which the constants of
``retool.plan`` were chosen; the others were measured afterwards.

glibc is told to give each block of 1 MiB its own pages. Left to itself (``--heap``) it keeps blocks below 32 MiB in a
heap with holes, and the same tensors take up to 2.4 times as much.

    python benchmarks/memory_plan.py [--heap] [CASE …]
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Case:
    """A model, and micro-batches of ``rows`` rows of ``length`` tokens after ``prefix`` common ones; without a prefix
    one row, which is longer than ``micro_batch_tokens``."""

    hidden: int
    layers: int
    heads: int
    kv: int
    feed_forward: int
    vocabulary: int
    prefix: int
    rows: int
    length: int
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the recipe, beside those that give the micro-batch this shape."""
    fitted: bool = False


SMALL, REAL = 32_000, 151_936
BF16 = {"model.dtype": "bfloat16"}
AGAIN = {"engine.gradient_checkpointing": True}
LORA = {"model.lora.rank": 16}
CASES = {
    "one long row": Case(384, 8, 6, 2, 1536, SMALL, 0, 1, 4096, fitted=True),
    "real vocabulary": Case(256, 6, 4, 2, 1024, REAL, 0, 1, 2048, fitted=True),
    "muon": Case(512, 10, 8, 2, 2048, SMALL, 0, 1, 512, {"rl.optim.name": "muon"}, fitted=True),
    "bf16": Case(384, 8, 6, 2, 1536, SMALL, 0, 1, 4096, BF16, fitted=True),
    "deep, small vocabulary": Case(256, 24, 4, 2, 1024, 1_024, 0, 1, 2048),
    "long row, all heads have keys": Case(256, 8, 4, 4, 768, SMALL, 0, 1, 4096),
    "many rows, long prefix": Case(384, 8, 6, 2, 1024, SMALL, 512, 16, 192),
    "two rows, short prefix": Case(256, 12, 4, 2, 768, 4_096, 64, 2, 2048),
    "bf16, real vocabulary": Case(384, 4, 6, 2, 2048, REAL, 128, 4, 480, BF16),
    "bf16, many weights, few tokens": Case(896, 8, 14, 2, 3584, SMALL, 0, 1, 512, BF16),
    "fp32, many weights, few tokens": Case(896, 8, 14, 2, 3584, SMALL, 0, 1, 512),
    "muon, real vocabulary": Case(256, 8, 4, 2, 1024, REAL, 256, 4, 320, {"rl.optim.name": "muon"}),
    "checkpointing": Case(384, 16, 6, 2, 1536, SMALL, 0, 1, 4096, AGAIN),
    "checkpointing, bf16, rows": Case(512, 12, 8, 4, 2048, 8_192, 256, 8, 768, AGAIN | BF16),
    "lora": Case(512, 8, 8, 2, 2048, SMALL, 0, 1, 2048, LORA),
    "lora, bf16, rows": Case(512, 8, 8, 2, 2048, SMALL, 128, 4, 640, LORA | BF16),
    "lora, bf16, checkpointing": Case(512, 8, 8, 2, 2048, REAL, 0, 1, 2048, LORA | BF16 | AGAIN),
    "critic": Case(384, 8, 6, 2, 1536, SMALL, 128, 4, 512, {"rl.advantage": "gae", "rl.algorithm": "ppo"}),
    "critic and KL reference, bf16": Case(
        512, 8, 8, 2, 2048, SMALL, 64, 2, 640, BF16 | {"rl.algorithm": "ppo", "rl.kl.place": "reward"}
    ),
    "small": Case(128, 4, 4, 2, 512, SMALL, 64, 4, 128),
    "entropy bonus": Case(256, 4, 4, 2, 768, REAL, 64, 4, 256, {"rl.entropy_bonus": 0.01}),
}


def most_tokens(case: Case) -> int:
    """``micro_batch_tokens``: one row is a micro-batch by itself where it is longer."""
    return case.prefix + case.rows * case.length if case.prefix else case.length // 2


def recipe_of(case: Case) -> Any:
    from retool.config import make_recipe

    sections: dict[str, Any] = {}
    shape = {
        "rl.micro_batch_tokens": most_tokens(case),
        "rl.group_size": max(2, case.rows),
        "rollout.max_context": case.prefix + case.length if case.prefix else case.length,
        "rollout.max_response_tokens": case.length if case.prefix else case.length - 1,
        "engine.kv_budget_mb": 1,
    }
    for name, value in (shape | case.settings).items():
        *parents, last = name.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return make_recipe(sections)


def samples_of(case: Case, count: int) -> list[Any]:
    """Rows that all share the prefix and nothing else, every token behind it learnt."""
    import torch

    from retool.algo.batch import Sample

    draw = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> list[int]:
        found: list[int] = torch.randint(case.vocabulary, (tokens,), generator=draw).tolist()
        return found

    common = ids(case.prefix + 1)
    mask = [0] * len(common) + [1] * case.length
    rows = [[*common, i, *ids(case.length - 1)] for i in range(count)]
    if not case.prefix:
        rows = [[i, *row[1:]] for i, row in enumerate(rows)]
    return [
        Sample(row, mask, [-1.0] * len(row), values_N=[0.0] * case.length, returns_N=[0.5] * case.length)
        for row in rows
    ]


def held() -> tuple[int, int]:
    """Bytes that the process holds, and the most that it ever held."""
    status = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024


def train(case: Case) -> Any:
    """The trainer after a step of one short row, and one of two micro-batches. Returns the parameters' number."""
    import torch
    from transformers import AutoModelForCausalLM

    from retool.config import Recipe
    from retool.engine.lora import add_lora
    from retool.engine.model import random_architecture
    from retool.update import Trainer, policy_loss

    recipe: Recipe = recipe_of(case)
    sizes = {"hidden_size": case.hidden, "num_hidden_layers": case.layers, "num_attention_heads": case.heads,
             "num_key_value_heads": case.kv, "intermediate_size": case.feed_forward}  # fmt: skip
    dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(random_architecture(sizes, case.vocabulary), dtype=dtype)
    parameters = model.num_parameters()
    if recipe.model.lora.rank:
        add_lora(model, recipe.model.lora, 0)
    if recipe.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(model, recipe)
    few = samples_of(Case(*[*list(asdict(case).values())[:6], 0, 1, 16]), 1)
    many = samples_of(case, 2 * case.rows)
    for samples in (few, many):
        if trainer.critic is not None:
            trainer._learn_values([(samples, len(samples))], trainer.critic)
        trainer.actor.update(samples, policy_loss(recipe.rl))
    assert parameters == architecture_of(case).parameters
    return trainer


def architecture_of(case: Case) -> Any:
    from retool.memory import Architecture

    return Architecture(
        case.hidden, case.layers, case.heads, case.kv, case.feed_forward, case.vocabulary, tie_word_embeddings=True
    )


def measure(case: Case, *, own_pages: bool) -> dict[str, Any]:
    """In a process of its own."""
    from retool.algo.batch import micro_batches
    from retool.memory import estimate_phases

    libc = ctypes.CDLL("libc.so.6")
    if own_pages:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    tiny = Case(32, 1, 2, 1, 64, 256, case.prefix and 4, 2, 8, case.settings)
    train(tiny)  # loads what is loaded when it is first used
    batch = micro_batches(samples_of(case, 2 * case.rows), most_tokens(case))
    shape = (batch[0].prefix_P.shape[0], *batch[0].ids_BT.shape)
    assert len(batch) == 2 and shape == (case.prefix, case.rows, case.length), (len(batch), shape)
    del batch
    gc.collect()
    libc.malloc_trim(0)
    before, _ = held()
    began = time.perf_counter()
    train(case)
    seconds = time.perf_counter() - began
    taken = (held()[1] - before) / (1 << 30)
    parts = estimate_phases("rl", recipe_of(case), architecture_of(case), gpu=False)["learning"]
    return {
        "taken": taken,
        "seconds": seconds,
        "parts": {name: size for name, size in parts.items() if name != "KV cache"},
    }


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    heap = ["--heap"] if "--heap" in sys.argv else []
    if "--one" in sys.argv:
        print(json.dumps(measure(CASES[arguments[0]], own_pages=not heap)))
        return
    ratios: dict[str, float] = {}
    for name in arguments or CASES:
        run = subprocess.run([sys.executable, __file__, "--one", name, *heap], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{name}: {run.stderr}")
        found = json.loads(run.stdout.splitlines()[-1])
        estimated = sum(found["parts"].values())
        ratios[name] = estimated / found["taken"]
        kind = "fitted" if CASES[name].fitted else "held out"
        shown = ", ".join(f"{part} {size:.2f}" for part, size in found["parts"].items())
        print(
            f"{name:32} {kind:8}  taken {found['taken']:5.2f} GiB in {found['seconds']:3.0f} s, estimated "
            f"{estimated:5.2f} GiB, ratio {ratios[name]:.2f}  ({shown})",
            flush=True,
        )
    for kind, fitted in (("fitted", True), ("held out", False)):
        chosen = [ratio for name, ratio in ratios.items() if CASES[name].fitted == fitted]
        if chosen:
            print(f"{kind}: {len(chosen)} cases, estimate ÷ taken {min(chosen):.2f} to {max(chosen):.2f}")


if __name__ == "__main__":
    main()
