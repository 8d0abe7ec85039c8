"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft.

An adapted linear layer computes ``W x + (alpha / rank) · B A x``. ``W`` never changes; ``A`` and ``B`` are learnt. peft
replaces the layers inside the transformers model, whose class, attributes and forward stay what they were, so that
the learner and the sampler need not know. ``A`` and ``B`` are float32 whatever the base is.

A folder with an adapter is peft's own and nothing of ours: ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retool.config import LoraConfig
from retool.errors import ConfigError, DataError, InvariantError

ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""peft's name for the only adapter; it is not written to files."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NOT_PLAIN = ("use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens")
"""Settings that change the function which the weights stand for; so do starts that alter the base (pissa)."""
FILE_PREFIX = "base_model.model."
"""Of every name in the file of weights: where a ``PeftModel`` holds the transformers model."""


def _layers(model: Any) -> dict[str, Any]:
    """The adapted layers under their names in the plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def has_lora(model: Any) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


def add_lora(model: Any, config: LoraConfig, seed: int) -> None:
    """Put adapters into the model, in place, and freeze everything else. ``B`` is zero, so that the model computes
    what it did. ``A`` depends on nothing but the seed and the model's shape; torch's random state stays as it is.

    Raises:
        ConfigError: a target names no linear layer, or a tied output head.
    """
    if config.rank < 1 or has_lora(model):
        raise InvariantError("add_lora wants a rank of at least 1 and a model without adapters")
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_target_names(model, config.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws weights on the CPU, which ours replace
        peft.inject_adapter_in_model(peft_config, model, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(model).values():
        a, b = layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()  # peft made them in the base's precision
        drawn = torch.empty(a.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as the paper's code and peft
        with torch.no_grad():
            a.weight.copy_(drawn)
            b.weight.zero_()
    model.train(model.training)  # new modules are born in training mode


def _target_names(model: Any, targets: list[str]) -> list[str]:
    """What peft is told: last parts of names, as ``q_proj``, or whole names where the recipe has them.

    Raises:
        ConfigError: see ``add_lora``.
    """
    kinds = {name: isinstance(module, nn.Linear) for name, module in model.named_modules() if name}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    linear = sorted({name.rpartition(".")[2] for name, is_linear in kinds.items() if is_linear and name != head})
    names = sorted({n for target in targets for n in (linear if target == ALL_LINEAR else [target])})
    for name in names:
        matched = [module for module in kinds if module == name or module.endswith(f".{name}")]
        if not matched or not all(kinds[module] for module in matched):
            raise ConfigError(
                f"model.lora.targets = {targets!r}: no linear layer is named {name!r}; this model's are "
                f"{', '.join(linear)}, and {ALL_LINEAR!r} is all of them"
            )
        if head in matched and model.config.tie_word_embeddings:
            raise ConfigError(
                f"model.lora.targets = {targets!r}: {name!r} shares its weights with the input embeddings, so that an "
                f"adapter could not be merged; leave it out"
            )
    return names


@contextlib.contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Inside, the model computes what its base computes: the reference model, without a second copy of the weights."""
    layers = list(_layers(model).values())
    before = [(layer, not layer.disable_adapters) for layer in layers]
    # peft's switch also sets which weights are trainable, here as it was at the end
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, enabled in before:
            layer.enable_adapters(enabled)
        for p, requires_grad in trainable:
            p.requires_grad_(requires_grad)


@torch.no_grad()
def merged_state_dict(model: Any, device: torch.device | None = None) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what this one does: ``W + (alpha / rank) · B A``, summed in
    float32 and rounded to W's precision once. The model itself is not touched.

    Args:
        device: where the merged tensors go, one after the other (the CPU spares a second copy of the weights on the
            GPU); None: where the model is. The others are the model's own, as in ``state_dict()``.
    """
    layers = _layers(model)
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers:
            if rest == "weight":
                tensor = (tensor.float() + layers[owner].get_delta_weight(ADAPTER)).to(tensor.dtype)
                tensor = tensor.to(device or tensor.device)
            merged[f"{owner}.{rest}"] = tensor
        elif not any(f".{part}.{ADAPTER}." in name for part in ("lora_A", "lora_B")):
            merged[name] = tensor
    return merged


def _adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapters' weights under their names in the file."""
    weights = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {FILE_PREFIX + name: tensor for name, tensor in weights.items()}


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapters into an existing folder, as peft does.

    Args:
        base: the folder or hub name of the model that they belong to, which the file names.
    """
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # a set's order would differ from run to run
    config.save_pretrained(str(folder))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Put saved weights, bit by bit, into a model that has adapters already; an optimiser that holds them still does.

    Raises:
        ConfigError: the adapter has another rank, scale or shape than the model's.
        DataError: the folder holds no adapter that can be read.
    """
    _, saved = adapter_settings(folder)
    ours = model.peft_config[ADAPTER]
    for field, here, there in (("rank", ours.r, saved.rank), ("alpha", ours.lora_alpha, saved.alpha)):
        if here != there:
            raise ConfigError(f"model.lora.{field} = {here}: the adapter in {folder} has {there}; set it to that")
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / WEIGHTS_FILE}: cannot be read ({str(error).splitlines()[0]})") from None
    expected = {name: tensor.shape for name, tensor in _adapter_weights(model).items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ConfigError(
            f"model.lora.targets = {sorted(ours.target_modules)}: the adapter in {folder} is for {saved.targets} of "
            f"another model or for other layers; use the model.path and the targets that it was made with"
        )
    peft.set_peft_model_state_dict(model, weights, ADAPTER)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter as peft saves it (rather than a whole model)."""
    return (folder / CONFIG_FILE).is_file()


def adapter_settings(folder: Path) -> tuple[str, LoraConfig]:
    """The base model that a saved adapter names, and the settings with which ``add_lora`` makes its like.

    Raises:
        DataError: no such file, or the adapter is of a kind that this package cannot make.
    """
    file = folder / CONFIG_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        targets = saved["target_modules"]
        config = LoraConfig(
            rank=saved["r"],
            alpha=saved["lora_alpha"],
            dropout=saved["lora_dropout"],
            targets=[targets] if isinstance(targets, str) else sorted(targets),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{file}: no adapter's settings can be read from it ({reason})") from None
    unknown = [name for name in NOT_PLAIN if saved.get(name)]
    if saved.get("init_lora_weights") not in (True, False, None, "gaussian"):
        unknown.append("init_lora_weights")
    if saved.get("peft_type") != "LORA" or unknown:
        what = unknown[0] if unknown else saved.get("peft_type")
        raise DataError(f"{file}: plain LoRA only, and this adapter has {what}")
    return saved.get("base_model_name_or_path") or "", config
