"""One run's folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retool.config import Recipe, recipe_toml
from retool.errors import DataError, UserError
from retool.store.checkpoints import fault_of, remove
from retool.store.files import JsonlTracker, read_metrics, recover, rewind_metrics, to_json, write_file
from retool.store.trajectories import write_trajectories
from retool.types import TrajectoryGroup

MARKS = ("trajectories", "config.toml", "environment.json", "metrics.jsonl", "summary.json")
"""What makes a folder a run."""
VERSIONED = (
    "retool",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "math-verify",
    "sympy",
    "verl",
    "vllm",
)
"""Distributions whose versions bear on results."""
BEST = "best.json"
STEP_NAME = re.compile(r"step_(\d+)")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def git_commit(file: Path) -> str | None:
    """The commit that ``file`` is tracked in, with ``+`` where the work tree differs; None outside a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(file.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository: that commit would say nothing
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class RunFolder:
    """One run's folder. ``RunFolder(path)`` makes it, or takes up a run that is there and mends what a crash left;
    ``RunFolder.open(path)`` reads one and changes nothing.

    Raises:
        UserError: ``path`` is no run, or cannot be made one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run folder {str(path)!r}: a file of that name is in the way; choose another run.name")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._is_run():
            raise UserError(f"run folder {str(path)!r}: it holds other files and is no run; choose another run.name")
        try:
            (self.path / "trajectories").mkdir(parents=True, exist_ok=True)
            (self.path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run folder {str(path)!r}: {error.strerror}; choose a run.out that can be written"
            ) from None
        for folder in (self.path, self.path / "trajectories", self.path / "checkpoints"):
            recover(folder)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run, for reading."""
        folder = cls.__new__(cls)
        folder.path = Path(path)
        if not folder._is_run():
            raise UserError(f"run folder {str(path)!r}: there is no run; name a folder that retool wrote")
        return folder

    def _is_run(self) -> bool:
        return any((self.path / mark).exists() for mark in MARKS)

    # what the run was told, and where it ran

    def write_config(self, recipe: Recipe) -> None:
        """``config.toml``: the recipe with every default filled in, and without ``sandbox.token``."""
        write_file(self.path / "config.toml", recipe_toml(recipe))

    def config(self) -> dict[str, Any]:
        """``config.toml`` as a tree of sections; empty where there is none."""
        return self._read("config.toml", tomllib.loads)

    def write_environment(self, *, seed: int, device: str, **more: Any) -> None:
        """``environment.json``: versions, git commit, platform, device, seed, the command and the time (UTC)."""
        environment = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [_without_secret(argument) for argument in sys.argv],
            "seed": seed,
            "device": device,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "git_commit": git_commit(Path(__file__)),
            "versions": {name: version for name in VERSIONED if (version := _version(name))},
        }
        write_file(self.path / "environment.json", to_json(environment | more, indent=2) + "\n")

    def environment(self) -> dict[str, Any]:
        """``environment.json``; empty where there is none."""
        return self._read("environment.json", json.loads)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """``summary.json``: the run's result. What is not finite becomes null."""
        write_file(self.path / "summary.json", to_json(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty where there is none."""
        return self._read("summary.json", json.loads)

    def _read(self, name: str, parse: Any) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            return {}
        try:
            tree = parse(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: {error}; mend or remove it") from None
        if not isinstance(tree, dict):
            raise DataError(f"{path}: holds no table of names and values; mend or remove it")
        return tree

    # metrics

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def tracker(self) -> JsonlTracker:
        """Appends to ``metrics.jsonl``."""
        return JsonlTracker(self.metrics_path)

    def metrics(self) -> list[dict[str, float]]:
        """``metrics.jsonl`` as ``read_metrics`` reads it."""
        return read_metrics(self.metrics_path)

    # trajectories

    def step_trajectories(self, step: int) -> Path:
        return self.path / "trajectories" / f"step_{step:06d}.parquet"

    def eval_trajectories(self, label: str) -> Path:
        """Raises ValueError: the label is not made of letters, digits, ``_``, ``.`` and ``-``."""
        if not LABEL.fullmatch(label):
            raise ValueError(f"label {label!r}: use letters, digits, _, . and -")
        return self.path / "trajectories" / f"eval_{label}.parquet"

    def write_step(self, step: int, groups: Sequence[TrajectoryGroup]) -> Path:
        write_trajectories(self.step_trajectories(step), groups)
        return self.step_trajectories(step)

    def write_eval(self, label: str, groups: Sequence[TrajectoryGroup]) -> Path:
        write_trajectories(self.eval_trajectories(label), groups)
        return self.eval_trajectories(label)

    def trajectory_steps(self) -> list[int]:
        """Steps whose trajectories are kept, ascending."""
        return _steps(self.path / "trajectories", ".parquet")

    def eval_labels(self) -> list[str]:
        files = (self.path / "trajectories").glob("eval_*.parquet")
        return sorted(file.stem.removeprefix("eval_") for file in files)

    # checkpoints

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending: one that is being written does not bear its name yet."""
        return _steps(self.path / "checkpoints", "")

    def latest_checkpoint(self) -> Path | None:
        steps = self.checkpoint_steps()
        return self.checkpoint_path(steps[-1]) if steps else None

    def sound_checkpoint(self, complain: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose bytes are those that were written; each newer one that is not is named by one
        line."""
        for step in reversed(self.checkpoint_steps()):
            fault = fault_of(self.checkpoint_path(step))
            if fault is None:
                return self.checkpoint_path(step)
            complain(f"checkpoint {self.checkpoint_path(step)}: {fault}; it is not used")
        return None

    def write_best(self, best: dict[str, Any] | None) -> None:
        """``checkpoints/best.json``: ``step``, ``metric`` and ``value`` of the best checkpoint by validation; None
        where there is none yet."""
        path = self.path / "checkpoints" / BEST
        if best is None:
            path.unlink(missing_ok=True)
        else:
            write_file(path, to_json(best, indent=2) + "\n")

    def best(self) -> dict[str, Any] | None:
        """What ``write_best`` wrote."""
        return self._read(f"checkpoints/{BEST}", json.loads) or None

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the ``keep`` newest checkpoints and the best one; 0 keeps all."""
        best = (self.best() or {}).get("step")
        old = self.checkpoint_steps()[:-keep] if keep else []
        remove(self.checkpoint_path(step) for step in old if step != best)

    def rewind(self, step: int) -> None:
        """Forget metrics, trajectories and checkpoints of steps after ``step``, before a run is taken up from there."""
        rewind_metrics(self.metrics_path, step)
        remove(self.checkpoint_path(later) for later in self.checkpoint_steps() if later > step)
        for later in self.trajectory_steps():
            if later > step:
                self.step_trajectories(later).unlink()


def _without_secret(argument: str) -> str:
    """An override of ``sandbox.token`` without its value, and any other argument as it is."""
    key, equals, _ = argument.partition("=")
    return f"{key}{equals}…" if equals and key.strip() == "sandbox.token" else argument


def _steps(folder: Path, suffix: str) -> list[int]:
    names = [entry.name.removesuffix(suffix) for entry in folder.glob(f"step_*{suffix}")]
    return sorted(int(match.group(1)) for name in names if (match := STEP_NAME.fullmatch(name)))
