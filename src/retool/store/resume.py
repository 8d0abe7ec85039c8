"""Whose a run folder is, and where a run in it goes on: taken by one process, refused to another job or recipe, taken
up after its last checkpoint."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retool.config import HealthConfig, Recipe, recipe_toml
from retool.errors import UserError
from retool.store.files import claim
from retool.store.folder import RunFolder


class RunLock:
    """The right to work in a recipe's run folder, for one process at a time; it ends with the process at the latest.
    Inside, a folder that is not there yet is taken once it has been made.

    Raises:
        UserError: another process is at work there.
    """

    def __init__(self, recipe: Recipe):
        self.path, self._descriptor = Path(recipe.run.out) / recipe.run.name, -1

    def take(self) -> None:
        """Where the folder is there and not taken yet."""
        if self._descriptor >= 0 or not self.path.is_dir():
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        if not claim(descriptor):
            os.close(descriptor)
            raise UserError(
                f"run.name = {self.path.name!r}: another process is at work in {self.path}; choose another name"
            )
        self._descriptor = descriptor

    def __enter__(self) -> RunLock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def find_checkpoint(recipe: Recipe, job: str, complain: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, where the same job and recipe have left one in the recipe's run folder: the newest
    whose bytes are whole; ``complain`` hears of those that are not. Makes nothing: a job that cannot load what it needs
    leaves no folder behind.

    Raises:
        UserError: the folder holds another job or another recipe, or ``run.resume`` is never and there is one.
    """
    folder = find_run(recipe, job)
    if folder is None:
        return None
    checkpoint = folder.sound_checkpoint(complain)
    if checkpoint is None and folder.checkpoint_steps():
        raise UserError(
            f"run.name = {recipe.run.name!r}: no checkpoint in {folder.path} is whole; choose another name, or remove "
            "it to begin anew"
        )
    if checkpoint:
        refuse_changes(folder, recipe, job)
    return checkpoint


def find_run(recipe: Recipe, job: str, *, engine: str = "local") -> RunFolder | None:
    """The recipe's run folder where the same job on the same engine has begun in it; None where nothing has.

    Raises:
        UserError: another job or engine has, or ``run.resume`` is never.
    """
    path = Path(recipe.run.out) / recipe.run.name
    if not path.exists() or not (folder := RunFolder(path)).config():
        return None
    if recipe.run.resume == "never":
        raise UserError(f"run.name = {recipe.run.name!r}: {path} exists already; choose another name or remove it")
    environment = folder.environment()
    other, other_engine = environment.get("job", job), environment.get("engine", "local")
    if other != job:
        raise UserError(f"run.name = {recipe.run.name!r}: {path} holds a run of {other}; choose another name")
    if environment and other_engine != engine:
        raise UserError(
            f"run.name = {recipe.run.name!r}: {path} holds a run of --engine {other_engine}; choose another name"
        )
    return folder


def refuse_changes(folder: RunFolder, recipe: Recipe, job: str) -> None:
    """Raises UserError: the run in ``folder`` was begun with other settings than ``recipe``'s, and not just such as may
    change."""
    changed = sorted(_differences(folder.config(), tomllib.loads(recipe_toml(recipe))) - _may_change(recipe, job))
    if changed:
        raise UserError(
            f"run.name = {recipe.run.name!r}: {folder.path} holds a run with other settings "
            f"({', '.join(changed[:3])}); choose another name, remove it, or give the same settings to go on"
        )


HOUSEKEEPING = {
    *(f"run.{name}" for name in ("out", "name", "resume", "threads", "keep_checkpoints", "trackers", "project")),
    *(f"health.{name}" for name in HealthConfig.model_fields),
    "sft.save_every",
    "rl.save_every",
    "sandbox.workers",
    *(
        f"cluster.{name}"
        for name in ("address", "agent_workers", "gpu_memory_share", "logprob_tokens", "critic_tokens")
    ),
}
"""Settings with which a run may be taken up again."""
WHOLE = ("data.columns", "model.random_init")
"""Settings that are tables of a user's own names."""


def _may_change(recipe: Recipe, job: str) -> set[str]:
    """More steps are the same run going on only where nothing of the earlier ones depended on their number: a schedule
    does, and so do the world's demonstrations."""
    schedules = {"sft": recipe.sft.optim.schedule, "rl": recipe.rl.optim.schedule}
    fixed = schedules.get(job) != "constant" or (job == "sft" and recipe.data.train == "world")
    return HOUSEKEEPING if fixed else HOUSEKEEPING | {f"{job}.steps", f"{job}.epochs"}


def _differences(one: Any, other: Any, name: str = "") -> set[str]:
    """The dotted names of settings that two trees do not share. A setting that one of them lacks is none: it was added
    since, or removed."""
    if name in WHOLE or not isinstance(one, dict) or not isinstance(other, dict):
        return set() if one == other else {name}
    inner = (_differences(one[k], other[k], f"{name}.{k}" if name else k) for k in one.keys() & other.keys())
    return set().union(*inner)


def begin_run(recipe: Recipe, done: int = 0) -> RunFolder:
    """The recipe's run folder, made or taken up after step ``done``: what came later is forgotten."""
    folder = RunFolder(Path(recipe.run.out) / recipe.run.name)
    folder.write_config(recipe)
    folder.rewind(done)
    return folder


def finished(folder: RunFolder, done: int) -> dict[str, Any]:
    """The summary of a run whose steps are all done; where it was killed before it wrote one, the least of it."""
    if not folder.summary():
        folder.write_summary({"steps": done, "checkpoint": str(folder.checkpoint_path(done))})
    return folder.summary()


def step_of(checkpoint: Path | None) -> int:
    """How many steps a checkpoint has behind it; 0 without one."""
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
