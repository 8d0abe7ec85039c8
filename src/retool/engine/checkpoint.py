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
from retool.errors import InfraError, UserError
from retool.store import RunFolder, read_groups, seal, write_directory, write_trajectories
from retool.store.best import Best
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
    best: Best,
    left_over: Sequence[TrajectoryGroup] = (),
    last: bool = False,
) -> Path:
    """Everything after ``step`` steps; then old checkpoints go.

    Args:
        state: what the job wants back: numbers, strings, tensors, lists and dicts of them. torch's random state and
            ``best`` are added.
        best: is published too, before this checkpoint can be taken for an old one.
        left_over: trajectories that the job will still learn from.
        last: no step comes after it: with adapters the merged model is written whatever the recipe says.

    Raises:
        InfraError: it could not be written; the one before is whole.
    """
    path = folder.checkpoint_path(step)
    try:
        best.publish(folder)
        with write_directory(path) as aside:
            if has_lora(model):
                save_adapter(model, aside / ADAPTER, resolve_path(recipe.model.path))
            if not has_lora(model) or recipe.model.lora.save_merged or last:
                merged = merged_state_dict(model, torch.device("cpu")) if has_lora(model) else None
                save_model(model, tokenizer, aside, state=merged)
            torch.save(state | {"best": best.found, "random": _random_state()}, aside / TRAINER_STATE)
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
    """What ``save_checkpoint`` was given as ``state`` (with ``best``) and ``left_over``; torch's random state is set.

    Raises:
        UserError: an older version wrote it.
    """
    state: dict[str, Any] = torch.load(checkpoint / TRAINER_STATE, weights_only=True, map_location="cpu")
    if "random" not in state:
        raise UserError(f"checkpoint {checkpoint}: an older version wrote it; begin anew, with it as model.path")
    random = state.pop("random")
    torch.set_rng_state(random["cpu"])
    if len(random["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(random["cuda"])
    return state, read_groups(checkpoint / LEFT_OVER)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
