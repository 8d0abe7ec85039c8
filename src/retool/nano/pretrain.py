"""Make ``nano`` anew: its tokenizer and its weights, from generated text alone.

    python -m retool.nano.pretrain --out DIR [--steps N] [--seed N]

The text comes from ``data/corpus.py``; none of the families that the quickstart evaluates occurs in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from retool.algo.batch import Sample
from retool.config import OptimConfig, RunConfig
from retool.data.corpus import FACTS, documents
from retool.data.prompts import SYSTEM_PROMPT
from retool.engine.attention import NAME as ATTENTION
from retool.engine.learner import Learner, supervised
from retool.engine.model import NANO, prepare_torch, save_model_aside
from retool.formats.calls import TOOL_SCHEMA
from retool.formats.hermes import HermesFormat
from retool.progress import Progress
from retool.types import Conversation

VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+"
"""Words with the space before them, single digits, runs of signs, line breaks."""
TOKENIZER_DOCUMENTS = 20_000
FIXED_TEXT_REPEATS = 300
"""A fixed text counts as much as so many documents."""
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
}
STEPS = 1500
BATCH = 96
"""Documents a step."""
OPTIM = OptimConfig(
    name="muon", lr=4e-3, muon_lr=0.02, weight_decay=0.01, warmup_steps=50, schedule="linear", final_lr_share=0.05
)
HELD_OUT = 400
"""Documents on which the loss is reported."""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE on the corpus, single digits, with the chat's and the tool's tags as tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain_text(seed), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = (NANO / "chat_template.jinja").read_text(encoding="utf-8")
    return wrapped


def _plain_text(seed: int) -> Iterator[str]:
    """What the tokenizer learns from: the model's words and programs, and each fixed text often enough to count."""
    schema = json.dumps(TOOL_SCHEMA["function"])
    for document in islice(documents(f"tokenizer/{seed}"), TOKENIZER_DOCUMENTS):
        if isinstance(document, str):
            yield document
            continue
        for message in document.messages:
            yield f"\n{message['role']}\n{message['content']}"
            for call in message.get("tool_calls", []):
                yield json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]})
    for text in [SYSTEM_PROMPT, schema, "You can call this tool:\nTo call it, write:\n", *FACTS]:
        yield from [text] * FIXED_TEXT_REPEATS


def encode(document: Conversation | str, fmt: HermesFormat, tokenizer: Any) -> Sample:
    """A document as a sample: all of a plain text is learnt, of a chat the assistant's turns."""
    if isinstance(document, str):
        ids = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.pad_token_id]
        ids.insert(0, tokenizer.pad_token_id)
        return Sample(ids, [0] + [1] * (len(ids) - 1))
    return Sample(*fmt.conversation_ids(document.messages, tools=document.tools))


def pretrain(out: Path, *, steps: int, seed: int, threads: int, progress: Progress) -> dict[str, float]:
    """Train the tokenizer and the model, and write both to ``out`` in Hugging Face layout.

    Returns:
        ``held_out_loss`` (nats a token on documents of another seed), ``parameters``, ``tokens``, ``seconds``.
    """
    started = time.perf_counter()
    prepare_torch(RunConfig(seed=seed, threads=threads))
    tokenizer = train_tokenizer(seed)
    fmt = HermesFormat(tokenizer)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION,
        **ARCHITECTURE,
    )
    model = AutoModelForCausalLM.from_config(config)
    learner = Learner(model, OPTIM, total_steps=steps, micro_batch_tokens=6000)
    stream = (encode(document, fmt, tokenizer) for document in documents(seed))
    held_out = [encode(d, fmt, tokenizer) for d in islice(documents(f"held-out/{seed}"), HELD_OUT)]
    tokens = 0.0
    with progress.stage("pre-training", total=steps) as stage:
        for step in range(steps):
            metrics = learner.update(list(islice(stream, BATCH)), supervised)
            tokens += metrics["tokens"]
            if step % 250 == 249 or step == steps - 1:
                metrics["held_out"] = learner.evaluate_loss(held_out)
                progress.line(f"step {step + 1}: held-out loss {metrics['held_out']:.4f}")
            stage.advance(loss=metrics["loss"], grad_norm=metrics["grad_norm"])
    save_model_aside(model, tokenizer, out)
    return {
        "held_out_loss": learner.evaluate_loss(held_out),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(out: Path, steps: int, seed: int, threads: int) -> None:
    """Train nano anew."""
    print(json.dumps(pretrain(out, steps=steps, seed=seed, threads=threads, progress=Progress())))


if __name__ == "__main__":
    main()
