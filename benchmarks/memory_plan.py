"""The memory that ``--dry-run`` estimates for learning, against what a training step takes on this machine's CPU.

Each case is a process of its own: a Qwen2 with random weights and the real size of vocabulary, two optimiser steps on
one micro-batch, and the growth of the process's peak over what it held before the model was there.
"""

from __future__ import annotations

import subprocess
import sys

CASES = {
    # hidden, layers, heads, key heads, feed-forward, vocabulary, rows, tokens a row
    "wide, real vocabulary": (512, 8, 8, 2, 2048, 151_665, 1, 2048),
    "deep, small vocabulary": (256, 24, 4, 2, 1024, 1_024, 1, 4096),
    "many short rows": (512, 8, 8, 8, 1376, 32_000, 16, 256),
    "a large micro-batch": (896, 6, 14, 2, 4864, 32_000, 2, 3072),
}


def measure(sizes: tuple[int, ...]) -> None:
    import resource

    import torch

    from retool.algo.batch import Sample
    from retool.config import OptimConfig, make_recipe
    from retool.engine.learner import Learner, supervised
    from retool.engine.model import random_architecture
    from retool.plan import Architecture, estimate_memory

    hidden, layers, heads, kv, feed_forward, vocabulary, rows, tokens = sizes
    torch.manual_seed(0)
    samples = [Sample(torch.randint(vocabulary, (tokens,)).tolist(), [0] + [1] * (tokens - 1)) for _ in range(rows)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from transformers import AutoModelForCausalLM

    names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
             "num_key_value_heads": kv, "intermediate_size": feed_forward}  # fmt: skip
    model = AutoModelForCausalLM.from_config(random_architecture(names, vocabulary), dtype=torch.float32)
    learner = Learner(model, OptimConfig(), total_steps=2, micro_batch_tokens=rows * tokens)
    for _ in range(2):
        learner.update(samples, supervised)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 20)
    architecture = Architecture(hidden, layers, heads, kv, feed_forward, vocabulary, True)
    assert architecture.parameters == model.num_parameters()
    recipe = make_recipe({"sft": {"micro_batch_tokens": rows * tokens}})
    parts = estimate_memory("sft", recipe, architecture, gpu=False)
    shown = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    total = sum(parts.values())
    print(f"taken {taken:.2f} GB, estimated {total:.2f} GB, ratio {total / taken:.2f}  ({shown})")


def main() -> None:
    if len(sys.argv) > 1:
        measure(CASES[sys.argv[1]])
        return
    for name in CASES:
        found = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        print(f"{name}: {found.stdout.strip()}")


if __name__ == "__main__":
    main()
