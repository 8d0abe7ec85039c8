"""What chunks of logits save: the peak of one training step at 18,432 tokens with the vocabulary of Qwen2.5 on a small
model, as the engine does it, against the same step with all logits at once.

All at once, 18,432 × 151,936 logits take 10.4 GiB a copy, and there are several: more than this machine has. So that
side is measured at fewer tokens and drawn out to 18,432 by the straight line through the two largest, after a look at
whether it is one. Each measurement is a process of its own; the peak is over what the process held before the step,
when the model, the optimiser's moments and all libraries were there.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

TOKENS, VOCABULARY, GOAL = 18_432, 151_936, 8
WHOLE = (1_024, 2_048, 3_072, 4_096)
"""Token counts at which all logits at once fit into this machine."""
CHUNKED = (1_024, 4_096, TOKENS)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 256}  # fmt: skip
GIB = 1 << 30


def held(name: str) -> int:
    """Bytes: ``VmRSS``, what this process holds, or ``VmHWM``, the most that it ever held."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def measure(tokens: int, chunked: bool) -> int:
    """The peak of a step in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from retool.algo.batch import Sample
    from retool.config import OptimConfig
    from retool.engine import learner
    from retool.engine.model import random_architecture, release_memory

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(random_architecture(SIZES, VOCABULARY), dtype=torch.float32)
    engine = learner.Learner(model, OptimConfig(), total_steps=2, micro_batch_tokens=tokens)
    if not chunked:
        learner.MAX_LOGITS = 1 << 60
    for count in (16, tokens):
        ids = torch.randint(VOCABULARY, (count + 1,)).tolist()
        release_memory()
        before = held("VmRSS")
        engine.update([Sample(ids, [0] + [1] * count)], learner.supervised)
    return held("VmHWM") - before


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1]), sys.argv[2] == "chunked"))
        return
    peaks: dict[tuple[str, int], float] = {}
    print(f"{'tokens':>8}  {'logits':8}  peak, GiB")
    for kind, counts in (("whole", WHOLE), ("chunked", CHUNKED)):
        for tokens in counts:
            run = subprocess.run(
                [sys.executable, __file__, str(tokens), kind], capture_output=True, text=True, check=True
            )
            peaks[kind, tokens] = int(run.stdout.splitlines()[-1]) / GIB
            print(f"{tokens:8,}  {kind:8}  {peaks[kind, tokens]:9.2f}", flush=True)
    before, last = WHOLE[-2:]
    slope = (peaks["whole", last] - peaks["whole", before]) / (last - before)
    for start, end in itertools.pairwise(WHOLE):
        rise = (peaks["whole", end] - peaks["whole", start]) / (end - start) * 1024
        print(f"whole, from {start:,} to {end:,} tokens: {rise:.2f} GiB for 1,024 tokens")
    drawn_out = peaks["whole", last] + slope * (TOKENS - last)
    ratio = peaks["chunked", TOKENS] / drawn_out
    print(f"whole, {TOKENS:,} tokens: {drawn_out:.1f} GiB, drawn out from {last:,}, not measured")
    print(f"chunked ÷ whole at {TOKENS:,} tokens: {ratio:.4f} = 1/{1 / ratio:.0f}; goal 1/{GOAL} or less: "
          f"{'met' if ratio <= 1 / GOAL else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
