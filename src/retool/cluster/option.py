"""What verl's options are made of: a job, an option, a value as Hydra reads it. Nothing here imports verl."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.config import Recipe

JOBS = ("sft", "rl", "evaluate")
CONFIGS = {"sft": "sft_trainer_engine", "rl": "ppo_trainer", "evaluate": "ppo_trainer"}
"""verl's configuration of each job."""
NANO = Path(__file__).parent.parent / "nano"
PLAIN_VALUE = re.compile(r"(?!(?:true|false|null|inf|nan)\Z)[A-Za-z_/][\w./:-]*", re.ASCII | re.IGNORECASE)
"""What Hydra reads as a string without quotes."""


@dataclass(frozen=True)
class Job:
    """What is launched."""

    name: str
    """One of ``JOBS``."""
    recipe: Recipe
    folder: Path
    """The run folder, absolute: workers have working folders of their own."""

    @property
    def state(self) -> Path:
        """verl's own part of the run folder."""
        return self.folder / "verl"


Getter = Callable[[Job], Any]


@dataclass(frozen=True)
class Option:
    """One option of verl."""

    key: str
    field: str
    """The recipe's field that sets it; empty: our own choice, which ``--verl`` may change."""
    get: Getter
    when: Callable[[Job], bool] = lambda job: True
    """Whether it is given at all."""


def value_of(field: str) -> Getter:
    """What reads the recipe's ``field``, e.g. ``rl.optim.lr``."""

    def get(job: Job) -> Any:
        value: Any = job.recipe
        for part in field.split("."):
            value = getattr(value, part)
        return value

    return get


def same(key: str, field: str, when: Callable[[Job], bool] = lambda job: True) -> Option:
    """An option that is the field as it stands."""
    return Option(key, field, value_of(field), when)


def chosen(key: str, value: Any, when: Callable[[Job], bool] = lambda job: True) -> Option:
    return Option(key, "", lambda job: value, when)


def model_path(recipe: Recipe) -> str:
    """A folder's absolute path, or a hub name as it stands."""
    return _place(str(NANO) if recipe.model.path == "nano" else recipe.model.path)


def _place(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _tokenizer(job: Job) -> str | None:
    return _place(job.recipe.model.tokenizer) if job.recipe.model.tokenizer else None


def optimiser(at: str, field: str, when: Callable[[Job], bool] = lambda job: True) -> tuple[Option, ...]:
    """An optimiser's options; sft, the actor and the critic have one each."""
    warmup_of = value_of(f"{field}.warmup_steps")

    def warmup(job: Job) -> int:
        """verl's scheduler goes on once a step, whatever the number of the step's updates."""
        rl = job.recipe.rl
        updates = rl.prompts // (rl.minibatch_prompts or rl.prompts) if field.startswith("rl.") else 1
        updates *= rl.critic.epochs if field.startswith("rl.critic.") else 1
        return -(-int(warmup_of(job)) // updates)

    return (
        same(f"{at}.lr", f"{field}.lr", when),
        same(f"{at}.betas", f"{field}.betas", when),
        same(f"{at}.weight_decay", f"{field}.weight_decay", when),
        Option(f"{at}.lr_warmup_steps", f"{field}.warmup_steps", warmup, when),
        same(f"{at}.lr_scheduler_type", f"{field}.schedule", when),
        same(f"{at}.min_lr_ratio", f"{field}.final_lr_share", when),
        same(f"{at}.clip_grad", f"{field}.grad_clip", when),
    )


def model(at: str, when: Callable[[Job], bool] = lambda job: True) -> tuple[Option, ...]:
    """A model's options."""
    return (
        Option(f"{at}.path", "model.path", lambda job: model_path(job.recipe), when),
        Option(f"{at}.tokenizer_path", "model.tokenizer", _tokenizer, when),
        chosen(f"{at}.use_remove_padding", True, when),
        same(f"{at}.enable_gradient_checkpointing", "engine.gradient_checkpointing", when),
    )


def has_critic(job: Job) -> bool:
    return job.name == "rl" and job.recipe.rl.has_critic


def room_for(tokens: int, longest: int, shared_by: int) -> int:
    """A GPU's share of a micro-batch: verl takes no sequence that is longer than the GPUs that share it hold together,
    where the local engine gives it a micro-batch of its own."""
    return max(tokens, -(-longest // shared_by))


def lora(at: str) -> tuple[Option, ...]:
    """An adapter's options."""

    def wanted(job: Job) -> bool:
        return job.recipe.model.lora.rank > 0

    def targets(job: Job) -> str | list[str]:
        names = job.recipe.model.lora.targets
        return names[0] if names == ["all-linear"] else names

    return (
        same(f"{at}.lora_rank", "model.lora.rank", wanted),
        same(f"{at}.lora_alpha", "model.lora.alpha", wanted),
        Option(f"{at}.target_modules", "model.lora.targets", targets, wanted),
    )


def hydra_value(value: Any) -> str:
    """``value`` as Hydra's override grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    if isinstance(value, str) and not PLAIN_VALUE.fullmatch(value):
        # backslashes stand for themselves but before a quote
        return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", value).replace("'", "\\'") + "'"
    return str(value)
