"""Checkpoints of a job: a model that any program loads, and beside it all that the job needs to go on as if nothing had
happened. Written aside, sealed with checksums and renamed."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from retool.config import Recipe
from retool.engine.lora import has_lora, merged_state_dict, save_adapter
from retool.engine.model import resolve_path, save_model
from retool.errors import InfraError
from retool.store import RunFolder, read_groups, seal, write_directory, write_trajectories
from retool.types import TrajectoryGroup

TRAINER_STATE = "trainer_state.pt"
LEFT_OVER = "left_over.parquet"
ADAPTER = "adapter"


def save_checkpoint(
    folder: RunFolder,
    step: int,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    state: dict[str, Any],
    *,
    left_over: Sequence[TrajectoryGroup] = (),
    last: bool = False,
) -> Path:
    """Everything after ``step`` steps; then old checkpoints go.

    Args:
        state: what the job wants back: numbers, strings, tensors, lists and dicts of them. torch's random state is
            added.
        left_over: trajectories that the job will still learn from.
        last: no step comes after it: with adapters the merged model is written whatever the recipe says.

    Raises:
        InfraError: it could not be written; the one before is whole.
    """
    path = folder.checkpoint_path(step)
    try:
        with write_directory(path) as aside:
            if has_lora(model):
                save_adapter(model, aside / ADAPTER, resolve_path(recipe.model.path))
            if not has_lora(model) or recipe.model.lora.save_merged or last:
                merged = merged_state_dict(model, torch.device("cpu")) if has_lora(model) else None
                save_model(model, tokenizer, aside, state=merged)
            torch.save(state | {"random": _random_state()}, aside / TRAINER_STATE)
            write_trajectories(aside / LEFT_OVER, left_over)
            seal(aside)
        folder.prune_checkpoints(recipe.run.keep_checkpoints)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        raise InfraError(_told(path, error)) from error
    return path


def _told(path: Path, error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "no space is left on the disk" if full else " ".join(str(error).split())[:200]
    return (
        f"checkpoint {path} could not be written ({reason}); the one before it is whole: mend this and type the same "
        "command again"
    )


def load_state(checkpoint: Path) -> tuple[dict[str, Any], list[TrajectoryGroup]]:
    """What ``save_checkpoint`` was given as ``state`` and ``left_over``; torch's random state is set."""
    state: dict[str, Any] = torch.load(checkpoint / TRAINER_STATE, weights_only=True, map_location="cpu")
    random = state.pop("random")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and random["cuda"]:
        torch.cuda.set_rng_state_all(random["cuda"])
    return state, read_groups(checkpoint / LEFT_OVER)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
