"""What a job would do and need, worked out from the recipe alone: ``--dry-run``.

What of it is memory is estimated in ``retool.memory``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.data.sets import SETS, is_hub_name, split_spec
from retool.memory import GB, Architecture, estimate_memory, estimate_phases

CLUSTER_GPU_GB = 80
SPARE = 0.1
"""The share of a machine's memory that an estimate should leave free."""


# The published config.json of each, so that a plan needs no network.
KNOWN = {
    "Qwen/Qwen2.5-0.5B-Instruct": Architecture(896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": Architecture(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": Architecture(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": Architecture(3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": Architecture(5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": Architecture(5120, 64, 40, 8, 27648, 152064, False),
    "Qwen/Qwen2.5-72B-Instruct": Architecture(8192, 80, 64, 8, 29568, 152064, False),
    "Qwen/Qwen3-4B": Architecture(2560, 36, 32, 8, 9728, 151936, True, 128, True),
    "Qwen/Qwen3-8B": Architecture(4096, 36, 32, 8, 12288, 151936, False, 128, True),
}


@dataclass(frozen=True)
class Machine:
    """Where the job would run."""

    device: str
    """``cpu``, or the GPU's name."""
    memory_gb: float

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass
class Plan:
    """What would run: facts in the order in which they are shown, and the memory by part."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    memory_gb: dict[str, float] = field(default_factory=dict)
    """GiB on this machine, in the phase that needs most; empty where the model is not at hand."""
    on_gpu_gb: dict[str, float] = field(default_factory=dict)
    """The same on a GPU, in bf16 unless the recipe says otherwise."""
    machine: Machine | None = None
    phases_gb: dict[str, float] = field(default_factory=dict)
    """The peak of each phase on a GPU, of which ``on_gpu_gb`` has the largest."""

    @property
    def total_gb(self) -> float:
        return sum(self.memory_gb.values())


def read_architecture(recipe: Recipe) -> Architecture | None:
    """The recipe's model: from its folder, from what the hub left on this machine, or from what is published; None
    where it is in none of these."""
    model = recipe.model
    if model.random_init:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **model.random_init}
        vocabulary = _vocabulary(Path(model.tokenizer))
        known = {"vocab_size": vocabulary or 0, "hidden_size": 0, "num_hidden_layers": 32, "intermediate_size": 22016}
        return _from_config({**known, **sizes})  # as Qwen2Config's own defaults
    folder = Path(__file__).parent / "nano" if model.path == "nano" else Path(model.path)
    config = folder / "config.json"
    if not config.is_file() and model.path not in KNOWN:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "config.json") if is_hub_name(model.path) else None
        config = Path(found) if isinstance(found, str) else config
    if config.is_file():
        return _from_config(json.loads(config.read_text(encoding="utf-8")))
    return KNOWN.get(model.path)


def _vocabulary(folder: Path) -> int | None:
    try:
        if (folder / "vocab.json").is_file():
            added = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            own = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            return len(own) + len(added.get("added_tokens_decoder", {}))
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [*whole["model"]["vocab"].values(), *(token["id"] for token in whole["added_tokens"])]
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_config(config: Mapping[str, Any]) -> Architecture | None:
    names = [name for name in Architecture.__dataclass_fields__ if name != "qk_norm"]
    given = {name: config[name] for name in names if config.get(name) is not None}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    given.setdefault("tie_word_embeddings", False)
    try:
        found = Architecture(**given, qk_norm=config.get("model_type") == "qwen3")
    except TypeError:  # a size that this kind of model does not have
        return None
    return found if found.hidden_size and found.vocab_size else None


def find_machine(device: str) -> Machine:
    """This machine: its GPU where there is one and the recipe may use it, else its memory."""
    from retool.doctor import available_memory_gb

    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return Machine(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / GB)
    return Machine("cpu", available_memory_gb())


def count_rows(spec: str, file: str, split: str) -> tuple[int | None, str]:
    """How many rows a set has, and where that is known from."""
    place = file or ("" if spec in SETS else spec)
    path = Path(place) if place else None
    if path and path.is_file():
        return _rows_of(path), str(path)
    known = SETS.get(spec)
    if place or known is None:
        there = path is not None and path.is_dir()
        return None, f"{place or spec}: {'a folder' if there else 'not at hand'}"
    return known.published.get(split or next(iter(known.splits))), f"as published: {known.hub}"


def _rows_of(path: Path) -> int | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        try:
            return int(pq.read_metadata(path).num_rows)
        except (OSError, ValueError):
            return None
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return None


def make_plan(job: str, recipe: Recipe, *, machine: Machine | None = None) -> Plan:
    """The plan of job ``sft``, ``rl`` or ``evaluate``."""
    machine = machine or find_machine(recipe.model.device)
    architecture = read_architecture(recipe)
    plan = Plan(machine=machine)
    size = f"{_short(architecture.parameters)} parameters" if architecture else "its size is not at hand"
    plan.facts.append(("model", f"{recipe.model.path}, {size}"))
    plan.facts.append(("format", f"{recipe.rollout.format}, {'with' if recipe.rollout.tools else 'without'} the tool"))
    if recipe.model.lora.rank:
        plan.facts.append(("LoRA", f"rank {recipe.model.lora.rank} on {', '.join(recipe.model.lora.targets)}"))
    _JOBS[job](recipe, plan)
    plan.facts.append(("run folder", str(Path(recipe.run.out) / recipe.run.name)))
    if architecture:
        plan.memory_gb = estimate_memory(job, recipe, architecture, gpu=machine.is_gpu)
        plan.on_gpu_gb = estimate_memory(job, recipe, architecture, gpu=True)
        phases = estimate_phases(job, recipe, architecture, gpu=True)
        plan.phases_gb = {phase: sum(parts.values()) for phase, parts in phases.items()}
    return plan


def _short(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _data(recipe: Recipe, plan: Plan, *, train: bool, split: str) -> int | None:
    """Add the data sets to the plan, ``split`` (may be empty) as what is evaluated on; returns the rows of the training
    set, where they are known."""
    data = recipe.data
    if data.train == "world":
        plan.facts.append(("data", "world: made as needed"))
        return None
    rows, whence = count_rows(data.train, data.train_file, "")
    if data.train_size and rows:
        rows = min(rows, data.train_size)
    if train:
        plan.facts.append(("train on", f"{data.train}: {_number(rows)} ({whence})"))
        if data.against:
            plan.facts.append(("less what is in", ", ".join(split_spec(spec)[0] for spec in data.against)))
    if split == "dev":
        tenth = max(1, rows // 10) if rows else None
        plan.facts.append(("evaluate on", f"{data.train}, dev: {_number(tenth)} (the training set's last tenth)"))
    elif split:
        name, part = (data.test, "") if data.test else (data.train, "test")
        found, whence = count_rows(name, data.test_file, part)
        plan.facts.append(("evaluate on", f"{name}, test: {_number(found)} ({whence})"))
    return rows


def _number(rows: int | None) -> str:
    return f"{rows:,} rows" if rows is not None else "rows not counted"


def _plan_sft(recipe: Recipe, plan: Plan) -> None:
    sft = recipe.sft
    rows = _data(recipe, plan, train=True, split="")
    # A tenth is held out (data/sources.py).
    steps = sft.steps or (-(-(rows - max(1, rows // 10)) * sft.epochs // sft.batch_size) if rows else 0)
    shown = f"{steps:,}" if steps else f"as many as {sft.epochs} × the data need"
    about = "" if sft.steps or not steps else f" ({sft.epochs} epochs, if every row can be used)"
    plan.facts.append(("steps", f"{shown}{about}, {sft.batch_size} conversations each"))
    plan.facts.append(("tokens a step", f"at most {sft.batch_size * sft.max_tokens:,}"))


def _plan_rl(recipe: Recipe, plan: Plan) -> None:
    rl, rollout = recipe.rl, recipe.rollout
    _data(recipe, plan, train=True, split=rl.eval_split if rl.eval_every else "")
    trajectories = rl.prompts * rl.group_size
    rounds = rl.dynamic_sampling.max_rounds if rl.dynamic_sampling.enabled else 1
    sampled = round(rounds * rl.tail.oversample * trajectories)
    updates = rl.prompts // (rl.minibatch_prompts or rl.prompts)
    plan.facts += [
        ("algorithm", f"{rl.algorithm}: advantage {rl.advantage}, loss {rl.loss}, {rl.aggregation}"),
        ("reward", f"{rl.reward}, {rl.grading} grading"),
        ("steps", f"{rl.steps:,}, {trajectories:,} trajectories each ({rl.prompts} tasks × {rl.group_size})"),
        ("optimiser steps a step", f"{updates}"),
        ("turns", f"at most {rollout.max_turns}, {rollout.max_response_tokens:,} response tokens"),
        ("tokens a step", f"at most {sampled * rollout.max_response_tokens:,} sampled and observed"),
    ]
    if rounds > 1:
        at_most = f"at most {rounds} rounds, {sampled:,} trajectories a step"
        plan.facts.append(("dynamic sampling", f"groups all right or all wrong are replaced: {at_most}"))
    if rl.has_critic:
        plan.facts.append(("critic", f"of the actor's size, alone for {rl.critic.warmup_steps} steps"))
    if rl.kl.place != "off":
        plan.facts.append(("KL penalty", f"in the {rl.kl.place}, {rl.kl.coef:g} × {rl.kl.estimator}"))
    if rl.eval_every:
        plan.facts.append(
            ("evaluations", f"every {rl.eval_every} steps, at most {rl.eval_size} problems × {recipe.eval.k} samples")
        )


def _plan_eval(recipe: Recipe, plan: Plan) -> None:
    _data(recipe, plan, train=False, split=recipe.data.test_split)
    size, k = recipe.data.test_size, recipe.eval.k
    plan.facts.append(("samples", f"at most {size} problems × {k}"))
    plan.facts.append(("tokens", f"at most {size * k * recipe.rollout.max_response_tokens:,}"))


_JOBS: dict[str, Callable[[Recipe, Plan], None]] = {"sft": _plan_sft, "rl": _plan_rl, "evaluate": _plan_eval}


def render(plan: Plan, *, memory: bool = True) -> str:
    """The plan as lines of text; ``memory`` is that of the local engine, on one device."""
    width = max(len(name) for name, _ in plan.facts)
    lines = [f"{name:{width}}  {text}" for name, text in plan.facts]
    if not memory:
        return "\n".join(lines)
    if not plan.memory_gb or plan.machine is None:
        return "\n".join([*lines, "memory: not known, since the model is not at hand"])
    machine, both = plan.machine, not plan.machine.is_gpu and plan.on_gpu_gb != plan.memory_gb
    columns = [plan.memory_gb, plan.on_gpu_gb] if both else [plan.memory_gb]
    names = list(dict.fromkeys(name for column in columns for name in column))
    wide = max(len(name) for name in names)
    header = "".join(f"{title:>12}" for title in ([machine.device, "GPU, bf16"] if both else [machine.device[:12]]))
    lines += ["", f"{'memory, estimated, GiB':{wide + 2}}{header}"]
    for name in names:
        lines.append(f"  {name:{wide}}" + "".join(f"{column.get(name, 0.0):12.2f}" for column in columns))
    lines.append(f"  {'all':{wide}}" + "".join(f"{sum(column.values()):12.2f}" for column in columns))
    if len(plan.phases_gb) > 1:
        shown = ", ".join(f"{phase} {size:.2f}" for phase, size in plan.phases_gb.items())
        lines.append(f"peaks of the phases on a GPU: {shown}")
    fits = "yes" if plan.total_gb <= (1 - SPARE) * machine.memory_gb else "hardly: too little is left free"
    fits = fits if plan.total_gb <= machine.memory_gb else "no"
    lines.append(f"fits this machine ({machine.device}, {machine.memory_gb:.1f} GiB): {fits}")
    needed = sum(plan.on_gpu_gb.values())
    gpus = int(-(-needed // ((1 - SPARE) * CLUSTER_GPU_GB)))
    if gpus > 1:
        lines.append(f"too large for one GPU of {CLUSTER_GPU_GB} GB: split evenly it fills {gpus} of them")
    elif not machine.is_gpu:
        lines.append(f"fits one GPU of {CLUSTER_GPU_GB} GB: yes")
    return "\n".join(lines)


__all__ = ["KNOWN", "Architecture", "Machine", "Plan", "estimate_memory", "make_plan", "render"]
