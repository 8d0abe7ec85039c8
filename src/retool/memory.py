"""The memory of the local engine's peak, part by part, from a recipe and an architecture: an estimate in GiB.

A step's learning, the rollout and an evaluation come one after the other; the phase that needs most counts. Parameters
follow from the architecture and are exact; weights, gradients, moments and KV cache follow from them; activations are
counted tensor by tensor, as the backward pass keeps them. ``benchmarks/memory_plan.py`` compares the estimate with what
a training step takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from retool.config import LoraConfig, OptimConfig, Recipe

GB = 1 << 30
"""One GiB: every size here is in it."""
MAX_LOGITS = 16 * 1024 * 1024
"""Of the learner: logits that exist at once (engine/learner.py, which imports torch; a test compares the two)."""
LOGIT_COPIES, ENTROPY_COPIES = 4, 3
"""fp32 tensors of that size: the logits, their log-softmax, its exponential, the product of the two; and how many more
where the entropy carries a gradient."""
MUON_COPIES = 6
"""fp32 tensors of the size of all matrices of one shape that exist while these are orthogonalised."""
OUTSIDE_LAYERS = 5
"""Numbers for each token, as multiples of the hidden width, that are kept outside the layers: the last norm's, the
hidden states of the targets and their gradient."""
ACTIVATIONS = "activations of a micro-batch"


@dataclass(frozen=True)
class Architecture:
    """A dense decoder's sizes, under config.json's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    qk_norm: bool = False
    """Qwen3: norms on queries and keys, and no biases."""

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        hidden, kv = self.hidden_size, self.num_key_value_heads * self.width
        queries = self.num_attention_heads * self.width
        extra = 2 * self.width if self.qk_norm else queries + 2 * kv
        attention = hidden * (queries + 2 * kv) + queries * hidden + extra
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = self.head * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + hidden

    @property
    def kv_numbers(self) -> int:
        """Numbers of KV cache per token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.width

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices: inputs and outputs of each."""
        hidden, heads, kv = (
            self.hidden_size,
            self.num_attention_heads * self.width,
            self.num_key_value_heads * self.width,
        )
        forward = self.intermediate_size
        return {
            "q_proj": (hidden, heads), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (heads, hidden),
            "gate_proj": (hidden, forward), "up_proj": (hidden, forward), "down_proj": (forward, hidden),
        }  # fmt: skip

    @property
    def head(self) -> int:
        """Numbers of the vocabulary's matrix."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: ``rows`` of ``length`` tokens after a common prefix (algo/batch.py)."""

    prefix: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.rows * self.length

    @property
    def mask(self) -> int:
        """Numbers of the attention mask, which rows need that share a prefix (engine/attention.py): one of bools, and
        torch makes one in the model's precision for each layer."""
        return self.length * (self.prefix + self.length) if self.prefix else 0


def shapes(job: str, recipe: Recipe) -> list[Shape]:
    """The largest micro-batches: one row, which may be longer than ``micro_batch_tokens``, and several that share
    as long a prompt as there is room for, long ones and a group."""
    rl, rollout, sft = recipe.rl, recipe.rollout, recipe.sft
    most, group = (sft.micro_batch_tokens, 2) if job == "sft" else (rl.micro_batch_tokens, rl.group_size)
    longest = sft.max_tokens if job == "sft" else rollout.max_context
    prefix = 1 if job == "sft" else longest - rollout.max_response_tokens  # the chat format's first token
    found = [Shape(0, 1, longest)]
    for rows in {2, max(2, group)}:
        each = min((most - prefix) // rows, longest - prefix)
        if each > 0:
            found.append(Shape(prefix, (most - prefix) // each, each))
    return found


def _layer_bytes(sizes: Architecture, shape: Shape, size: int, lora: LoraConfig) -> tuple[int, int]:
    """What the backward pass keeps of one layer, and what working on it takes besides."""
    tokens, hidden, forward = shape.tokens, sizes.hidden_size, sizes.intermediate_size
    heads, keys = sizes.num_attention_heads * sizes.width, shape.rows * (shape.prefix + shape.length)
    # Two norms: their inputs in fp32 and, where they learn, the scaled ones.
    kept = tokens * 2 * hidden * (4 if lora.rank else 4 + size)
    # Queries, and keys and values repeated for each query head, each row's with the prefix's; the output; the mask.
    kept += size * heads * 2 * (tokens + keys + shape.prefix) + size * shape.mask
    if sizes.qk_norm:
        kept += tokens * (heads + sizes.num_key_value_heads * sizes.width) * (4 + size)
    # Gate, its activation, up. Then the inputs of the linear layers that learn; peft makes each its own in fp32.
    kept += tokens * 3 * forward * size
    inputs = {"q_proj": "a", "k_proj": "a", "v_proj": "a", "gate_proj": "b", "up_proj": "b"}
    learning, copied = _learning(sizes, lora), lora.rank > 0 and size == 2
    own = {name if copied else inputs.get(name, name): sizes.linears[name][0] for name in learning}
    if not copied and not shape.prefix:
        own.pop("o_proj", None)  # it is attention's output
    kept += tokens * (4 if lora.rank else size) * sum(own.values())
    wide = size + (4 if lora.rank else 0)
    in_attention = size * (heads * 2 * (tokens + keys) - 4 * tokens * forward)
    return kept, max(2 * tokens * forward * wide, in_attention) + 3 * tokens * hidden * wide


def _learning(sizes: Architecture, lora: LoraConfig) -> list[str]:
    """Linear layers that learn or have an adapter that does."""
    names = {target.rpartition(".")[2] for target in lora.targets}
    return [name for name in sizes.linears if not lora.rank or "all-linear" in names or name in names]


def _learnt(sizes: Architecture, lora: LoraConfig, *, critic: bool = False) -> tuple[dict[str, int], int]:
    """Numbers that learn: in a layer's matrices (or their adapters), by name, and in all."""
    if lora.rank:
        each = {name: lora.rank * sum(sizes.linears[name]) for name in _learning(sizes, lora)}
        return each, sizes.num_hidden_layers * sum(each.values())
    headless = critic and not sizes.tie_word_embeddings
    return {name: a * b for name, (a, b) in sizes.linears.items()}, sizes.parameters - headless * sizes.head


def _optimiser_bytes(sizes: Architecture, recipe: Recipe, optim: OptimConfig, *, critic: bool = False) -> int:
    """Moments: AdamW has two, Muon one of hidden matrices (its embeddings are AdamW's)."""
    each, whole = _learnt(sizes, recipe.model.lora, critic=critic)
    return 4 * (2 * whole - (sizes.num_hidden_layers * sum(each.values()) if optim.name == "muon" else 0))


def _optimiser_step_bytes(sizes: Architecture, recipe: Recipe, optim: OptimConfig, *, gpu: bool) -> int:
    """What an optimiser's step takes for a while: AdamW on a GPU works on all parameters at once, Muon on all matrices
    of one shape."""
    each, whole = _learnt(sizes, recipe.model.lora)
    largest = max([*each.values(), 0 if recipe.model.lora.rank else sizes.head])
    if optim.name == "muon":
        return 4 * max(2 * largest, MUON_COPIES * 2 * sizes.num_hidden_layers * max(each.values()))
    return 4 * (whole if gpu else min(whole, 2 * largest))


def estimate_phases(job: str, recipe: Recipe, architecture: Architecture, *, gpu: bool) -> dict[str, dict[str, float]]:
    """GiB by part in each phase of the job: ``learning``, ``rollout``, ``evaluation``.

    Args:
        gpu: ``model.dtype = "auto"`` is bf16 there, fp32 on a CPU.
    """
    sizes, dtype, lora, rl = architecture, recipe.model.dtype, recipe.model.lora, recipe.rl
    size = 2 if dtype == "bfloat16" or (dtype == "auto" and gpu) else 4
    masters = size == 2 and not lora.rank
    learnt = _learnt(sizes, lora)[1]
    held: dict[str, float] = {"weights": sizes.parameters * size + (4 * learnt if lora.rank else 0)}
    found: dict[str, dict[str, float]] = {}
    if job != "evaluate":
        optim = recipe.sft.optim if job == "sft" else rl.optim
        if masters:
            held["master weights (fp32)"] = 4 * learnt
        held[f"optimiser ({optim.name})"] = _optimiser_bytes(sizes, recipe, optim)
        if job == "rl" and rl.has_critic:  # its gradients are gone when the actor's come
            own = 4 * _learnt(sizes, lora, critic=True)[1] * (masters or lora.rank > 0)
            body = size * (sizes.parameters - (not sizes.tie_word_embeddings) * sizes.head)
            body += own + _optimiser_bytes(sizes, recipe, rl.critic.optim, critic=True)
            held["critic (weights, optimiser)"] = body
        if job == "rl" and rl.kl.place != "off" and not lora.rank:
            held["reference (KL)"] = sizes.parameters * size
        found["learning"] = held | {"gradients": 4 * learnt} | _step_bytes(job, recipe, sizes, size, optim, gpu=gpu)
    if job != "sft":
        sequence = recipe.rollout.max_context * sizes.kv_numbers * size
        slots = min(recipe.engine.max_live * sequence, recipe.engine.kv_budget_mb << 20)
        rolling = held | {"KV cache": slots}
        rolling["sampling"] = 3 * 4 * (slots // sequence) * sizes.vocab_size + slots / sizes.num_hidden_layers
        found["rollout" if job == "rl" else "evaluation"] = rolling
        if job == "rl":
            found["learning"]["KV cache"] = slots  # it stays
    return {phase: {name: count / GB for name, count in parts.items()} for phase, parts in found.items()}


def _step_bytes(
    job: str, recipe: Recipe, sizes: Architecture, size: int, optim: OptimConfig, *, gpu: bool
) -> dict[str, float]:
    """What a step takes at its peak beside what is held and the gradients, which all are there from the second
    micro-batch on: where a backward pass begins or ends, or where the optimiser works."""
    lora, again = recipe.model.lora, recipe.engine.gradient_checkpointing
    head = 0 if lora.rank else sizes.head * size  # of its gradient, which each chunk of logits makes anew
    copies = LOGIT_COPIES + (ENTROPY_COPIES if job == "rl" and recipe.rl.entropy_bonus else 0)
    cases: list[dict[str, float]] = [{"optimiser's step": _optimiser_step_bytes(sizes, recipe, optim, gpu=gpu)}]
    for shape in shapes(job, recipe):
        hidden, logits = shape.tokens * sizes.hidden_size * size, shape.tokens * sizes.vocab_size
        layer, working = _layer_bytes(sizes, shape, size, lora)
        outside = OUTSIDE_LAYERS * hidden + shape.mask
        kept = outside + sizes.num_hidden_layers * (hidden if again else layer)
        working += (layer if again else 0) + (head if sizes.tie_word_embeddings else 0)
        chunk = 4 * min(MAX_LOGITS, logits)
        vocabulary = max(copies * chunk, (copies - 1) * chunk + (2 if logits > MAX_LOGITS else 1) * head)
        cases.append({ACTIVATIONS: kept, "logits": vocabulary})
        cases.append({ACTIVATIONS: kept + working})
        if size == 2 and not lora.rank:  # the backward pass ends; then its gradients are added to the fp32 ones
            cases.append({ACTIVATIONS: outside + working, "gradients (bf16)": 2 * _learnt(sizes, lora)[1]})
    return max(cases, key=lambda case: sum(case.values()))


def estimate_memory(job: str, recipe: Recipe, architecture: Architecture, *, gpu: bool) -> dict[str, float]:
    """GiB by part at the local engine's peak: in the phase of ``estimate_phases`` that takes most."""
    phases = estimate_phases(job, recipe, architecture, gpu=gpu)
    return max(phases.values(), key=lambda parts: sum(parts.values()))
