"""Where metrics go besides ``metrics.jsonl``: TensorBoard and Weights & Biases (``run.trackers``).

Both packages are optional and imported when a run that names them starts. No tracker can end a run: one that fails is
left out from then on, and one line says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.errors import ConfigError
from retool.protocols import Tracker
from retool.store import RunFolder, write_file

RUN_ID = "wandb_id.txt"
"""The file in the run folder that holds the W&B run's id."""
UPLOAD_S = 300.0
"""How long a run that is done waits for W&B to take the rest of its metrics. By itself wandb waits for ever, and a
network that is gone would keep the run from its end."""


class Trackers:
    """``protocols.Tracker`` over several, each with its name. Never raises: a member that fails is left out from then
    on, and ``complain`` gets one line about it."""

    def __init__(self, members: Sequence[tuple[str, Tracker]], complain: Callable[[str], None]) -> None:
        self._members = list(members)
        self._complain = complain

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for member in list(self._members):
            name, tracker = member
            try:
                tracker.log(step, metrics)
            except Exception as error:
                self._members.remove(member)
                self._complain(f"tracker {name} failed and is left out from now on: {_reason(error)}")
                # its second fault is a consequence of the first
                _closed(tracker)

    def close(self) -> None:
        members, self._members = self._members, []
        for name, tracker in members:
            if (error := _closed(tracker)) is not None:
                self._complain(f"tracker {name} could not be closed: {_reason(error)}")


def _closed(tracker: Tracker) -> Exception | None:
    """Close it; what went wrong is returned."""
    try:
        tracker.close()
    except Exception as error:
        return error
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


class TensorBoard:
    """``protocols.Tracker`` into TensorBoard event files, on the disk after each step. What is not finite is left out.

    Args:
        folder: where the event files lie; earlier ones of the same run may be there.
        done: steps that the run has behind it: what earlier files hold of later ones is not shown any more.
    """

    def __init__(self, folder: Path, *, done: int = 0) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """``protocols.Tracker`` into a run at Weights & Biases. What is not finite is left out. ``WANDB_MODE`` and wandb's
    other variables mean what they mean to wandb; its own files lie in ``folder/wandb``.

    The run's id is kept in ``folder/wandb_id.txt``, and the next process goes on in the same run. W&B cannot forget
    steps: those that a run repeats after a crash stay there as they were the first time.

    Args:
        folder: the run folder.
        job: W&B's job type, e.g. ``rl``.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, job: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        file = folder / RUN_ID
        known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        self._run = wandb.init(
            project=recipe.run.project,
            name=recipe.run.name,
            job_type=job,
            dir=str(folder),
            config=recipe.model_dump(mode="json", exclude={"sandbox": {"token"}}),
            id=known or None,
            resume="allow",
            # the default may hand out another run of this process that is still open
            reinit="create_new",
            settings={
                "finish_timeout": UPLOAD_S,
                "finish_timeout_raises": True,
                # what wandb records of the machine holds the command line too
                "x_disable_meta": any(arg.partition("=")[0].strip() == "sandbox.token" for arg in sys.argv),
            },
        )
        if self._run.id != known and not self._run.disabled:
            write_file(file, f"{self._run.id}\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def check_trackers(recipe: Recipe) -> None:
    """Quick: imports nothing.

    Raises:
        ConfigError: the package of one of ``run.trackers`` is not installed.
    """
    for name in recipe.run.trackers:
        spec = importlib.util.find_spec(name)
        # a folder that happens to be called wandb, as wandb's own is, has a spec without an origin
        if spec is None or spec.origin is None:
            raise ConfigError(f"run.trackers holds {name!r}: the package is not installed; pip install {name}")


def open_trackers(
    folder: RunFolder, recipe: Recipe, complain: Callable[[str], None], *, job: str, done: int = 0
) -> Trackers:
    """``metrics.jsonl`` and each of ``run.trackers``. One that cannot start (no login, no network) is left out, and
    ``complain`` gets one line about it.

    Args:
        complain: shows a line to the user.
        job: ``sft`` or ``rl``.
        done: steps that the run has behind it.

    Raises:
        ConfigError: as ``check_trackers``, before anything is opened.
    """
    check_trackers(recipe)
    members: list[tuple[str, Tracker]] = [("metrics.jsonl", folder.tracker())]
    for name in dict.fromkeys(recipe.run.trackers):
        try:
            if name == "tensorboard":
                members.append((name, TensorBoard(folder.path / "tensorboard", done=done)))
            else:
                members.append((name, WeightsAndBiases(folder.path, recipe, job=job)))
        except Exception as error:
            complain(f"tracker {name} could not start and is left out: {_reason(error)}")
    return Trackers(members, complain)
