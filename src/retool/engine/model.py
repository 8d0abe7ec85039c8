"""Loading and saving models in Hugging Face layout, and choosing the device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config
from transformers.utils import logging as transformers_logging

from retool.config import ModelConfig, RunConfig
from retool.engine.attention import NAME as ATTENTION
from retool.errors import ConfigError
from retool.formats.tokenizer import load_tokenizer
from retool.store import write_directory

NANO = Path(__file__).parent.parent / "nano"
"""The base model inside this package."""


def choose_device(config: ModelConfig) -> torch.device:
    """Raises:
    ConfigError: CUDA is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': torch sees no GPU; use 'cpu' or 'auto', or install torch with CUDA")
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def prepare_torch(run: RunConfig) -> None:
    """Threads, seeds, and reproducible kernels where the run asks for them."""
    use_threads(run, sandbox=False)
    torch.manual_seed(run.seed)
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)


def use_threads(run: RunConfig, *, sandbox: bool) -> None:
    """Set torch's CPU threads for what comes next: work beside which code runs leaves a core to the sandbox."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(run.threads or max(1, cores - sandbox))


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, or None on other C libraries."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def release_memory() -> None:
    """Give freed memory back to the system. Rollouts and learning want blocks of different sizes, and without this
    glibc keeps the peaks of both (a quarter of the quickstart's memory)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def resolve_path(path: str) -> str:
    return str(NANO) if path == "nano" else path


def load_model(config: ModelConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model on its device, with our attention, and its tokenizer.

    Raises:
        ConfigError: the model or tokenizer cannot be loaded; one line that names the field.
    """
    transformers_logging.disable_progress_bar()  # ours is the only bar
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    tokenizer = load_tokenizer(resolve_path(config.tokenizer or config.path))
    if config.random_init:
        model = AutoModelForCausalLM.from_config(random_architecture(config.random_init, len(tokenizer)), dtype=dtype)
    else:
        path = resolve_path(config.path)
        try:
            architecture = AutoConfig.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(
                path, config=architecture, dtype=dtype, attn_implementation=ATTENTION
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"model.path = {config.path!r}: no model folder or hub name ({reason})") from None
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        raise ConfigError(f"model.path = {config.path!r}: sliding-window attention is not supported; turn it off")
    return model.to(device), tokenizer


def random_architecture(sizes: dict[str, int], vocabulary: int) -> Qwen2Config:
    """The Qwen2 of these sizes, with four heads on two key heads and tied embeddings unless they say otherwise.

    Raises:
        ConfigError: a size that Qwen2 does not have, or sizes that do not fit together.
    """
    whole = {"vocab_size": vocabulary, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    unknown = [name for name in sizes if not hasattr(Qwen2Config(), name)]
    if unknown:
        raise ConfigError(f"model.random_init: Qwen2 has no {unknown[0]!r}; the names are those of its config.json")
    hidden, heads, key_heads = (whole.get(n, 0) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden < 1 or hidden % (2 * heads) or heads % key_heads:
        raise ConfigError(
            f"model.random_init: hidden_size = {hidden} must be a multiple of 2 × num_attention_heads = 2 × {heads}, "
            f"and the heads of num_key_value_heads = {key_heads}"
        )
    return Qwen2Config(tie_word_embeddings=True, attn_implementation=ATTENTION, **whole)


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, state: dict[str, Tensor] | None = None
) -> None:
    """Write the model and its tokenizer in Hugging Face layout into an existing folder, without a word of ours: the
    attention implementation saved is the default one, so that any program loads it.

    Args:
        state: other weights for it, under the model's names (an adapter merged in).
    """
    with _default_attention(model):
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def save_model_aside(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same, written aside and renamed, so that a crash leaves either the old folder or the new one."""
    with write_directory(folder) as aside:
        save_model(model, tokenizer, aside)


@contextlib.contextmanager
def _default_attention(model: Any) -> Any:
    ours = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = ours
