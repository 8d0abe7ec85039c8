"""From a recipe to verl's options: the tables put together, what cannot be, and what the user adds.

Nothing here imports verl. What has no line is verl's default, and can be given as ``--verl key=value``; a key that a
field of the recipe sets is refused there, so that ``config.toml`` says what ran.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retool.cluster.option import CONFIGS, Job, Option, hydra_value, value_of
from retool.cluster.refusals import REFUSED_EVAL, REFUSED_RL, Refusal, notes_of
from retool.cluster.rl_options import RL
from retool.cluster.sft import REFUSED_SFT, SFT
from retool.config import Recipe
from retool.errors import ConfigError

TABLES: dict[str, tuple[Option, ...]] = {"sft": SFT, "rl": RL, "evaluate": RL}
REFUSED: dict[str, tuple[Refusal, ...]] = {"sft": REFUSED_SFT, "rl": REFUSED_RL, "evaluate": REFUSED_EVAL}


def refuse(job: Job) -> None:
    """Raises ConfigError: the recipe asks for what this engine cannot do."""
    for field, asked, reason in REFUSED[job.name]:
        if asked(job):
            raise ConfigError(
                f"{field} = {json.dumps(value_of(field)(job))} with --engine verl: {reason}, or use --engine local"
            )


def _key_of(override: str) -> str:
    key, equals, _ = override.partition("=")
    key = key.strip().lstrip("+~")
    if not key or not (equals or override.startswith("~")):
        raise ConfigError(f"--verl {override!r}: write key=value, e.g. actor_rollout_ref.rollout.enforce_eager=true")
    return key


def _touches(key: str, other: str) -> bool:
    """Whether one of two keys is the other, holds it, or is a part of it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def options_of(job: Job) -> list[tuple[Option, Any]]:
    """The job's lines of the table, with their values."""
    return [(option, option.get(job)) for option in TABLES[job.name] if option.when(job)]


def overrides_of(job: Job, extra: Sequence[str] = ()) -> list[str]:
    """verl's command line: the table's options, then ``extra``, which may replace those that no field sets.

    Raises:
        ConfigError: the recipe asks for what verl cannot do, or ``extra`` for what a field sets.
    """
    refuse(job)
    given = {_key_of(override): override for override in extra}
    lines = []
    for option, value in options_of(job):
        key = option.key.lstrip("+")
        touching = [override for other, override in given.items() if _touches(key, other)]
        if option.field and touching:
            raise ConfigError(f"--verl {touching[0]}: the recipe sets that; give {option.field}=… instead")
        if key not in given:
            lines.append(f"{option.key}={hydra_value(value)}")
    return [*lines, *extra]


def command_of(job: Job, overrides: Sequence[str]) -> list[str]:
    """What the launcher gives to Python."""
    return ["-m", "retool.cluster.main", str(job.folder), job.name, *overrides]


def describe(name: str, recipe: Recipe, extra: Sequence[str] = ()) -> list[str]:
    """For people: each of verl's options with the field that sets it, then the command that would run.

    Raises:
        ConfigError: as ``overrides_of``.
    """
    job = Job(name, recipe, (Path(recipe.run.out) / recipe.run.name).resolve())
    overrides = overrides_of(job, extra)
    fields = {option.key: option.field or "chosen for every run" for option, _ in options_of(job)}
    cluster = recipe.cluster
    lines = [
        f"GPUs: {cluster.nodes} × {cluster.gpus_per_node}; {cluster.sequence_parallel} share a sequence in training, "
        f"{cluster.tensor_parallel} a sampling model; memory: docs/cluster.md",
        "",
        f"verl's options ({CONFIGS[name]}.yaml), and the recipe's field that sets each:",
    ]
    width = max(map(len, overrides))
    for override in overrides:
        known = fields.get(override.partition("=")[0]) if override not in extra else None
        lines.append(f"  {override:{width}}  {known or '--verl'}")
    lines += [f"note: {note}" for note in notes_of(job)]
    return [
        *lines,
        "",
        "the command, once the run folder has its data:",
        f"  python {shlex.join(command_of(job, overrides))}",
    ]
