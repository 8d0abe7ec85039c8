"""Watching verl from outside: its metrics become the run folder's and the terminal's, its errors one line."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retool.cluster.main import ERROR
from retool.cluster.option import Job
from retool.cluster.options import command_of
from retool.cluster.process import Child, last_error
from retool.errors import HealthError, InfraError, UserError
from retool.health import MODELS, Monitor
from retool.metrics import figures
from retool.progress import Progress, Stage
from retool.store import RunFolder
from retool.trackers import Trackers, open_trackers

POLL_S = 0.3
LABELS = {"sft": "SFT", "rl": "RL", "evaluate": "evaluation"}
NAMES = {"sft": "sft", "rl": "rl", "evaluate": "eval"}
"""What the run folder calls a job."""


NONE_LEFT = "no materializable trajectories"
"""verl's words, which go on with advice that does not help."""


class Lines:
    """A file that another process appends to: the whole lines that are new."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> Iterator[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                found = file.read()
        except FileNotFoundError:
            return
        end = found.rfind(b"\n") + 1
        self._read += end
        yield from found[:end].decode(errors="replace").splitlines()


class Watch:
    """One start of verl."""

    def __init__(self, job: Job, folder: RunFolder, done: int, total: int, progress: Progress) -> None:
        self._job, self._folder, self._done, self._progress = job, folder, done, progress
        self._total, self._label = total, LABELS[job.name]
        self._monitor = Monitor(job.recipe.health, compares_groups=job.recipe.rl.compares_groups)
        self._log = job.state / "log.txt"

    def run(self, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start verl and stay until it is done.

        Raises:
            HealthError: an alarm that ends the run; verl has been ended.
            InfraError: verl ended with an error.
            UserError: what it told is a mistake of the user.
        """
        log_file = self._job.state / "metrics.jsonl"
        for file in (log_file, self._job.state / ERROR):
            file.unlink(missing_ok=True)
        log_start = self._log.stat().st_size if self._log.exists() else 0
        name, recipe = NAMES[self._job.name], self._job.recipe
        self._monitor.replay(self._folder.metrics())
        tracker = open_trackers(self._folder, recipe, self._progress.line, job=name, done=self._done)
        self._progress.line(f"verl starts; what it prints is in {self._log}")
        try:
            with (
                Child(
                    command_of(self._job, overrides), {"VERL_FILE_LOGGER_PATH": str(log_file), **environment}, self._log
                ) as child,
                self._progress.stage(self._label, total=self._total) as stage,
            ):
                stage.advance(self._done)
                code = self._follow(child, Lines(log_file), tracker, stage)
                if code:
                    raise self._failure(code, log_start)
        finally:
            tracker.close()

    def _follow(self, child: Child, lines: Lines, tracker: Trackers, stage: Stage) -> int:
        step, gathered = 0, dict[str, float]()
        try:
            while True:
                code = child.poll()
                for line in lines.new():
                    row = json.loads(line)
                    # sft logs a step's held-out loss by itself, after the step
                    if gathered and row["step"] != step:
                        self._take(step, gathered, tracker, stage)
                        gathered = {}
                    step, gathered = int(row["step"]), gathered | numbers_of(row["data"])
                    if self._job.name != "sft":
                        taken, gathered = gathered, {}
                        self._take(step, taken, tracker, stage)
                if code is not None:
                    return code
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._progress.line("verl's processes are being ended: this may take a minute")
            raise
        finally:
            if gathered:
                self._take(step, gathered, tracker, stage)

    def _take(self, step: int, metrics: dict[str, float], tracker: Trackers, stage: Stage) -> None:
        if self._job.name == "evaluate" or (self._done and step <= self._done):
            return  # a validation before the first step, which an earlier start has logged
        alarms = self._monitor.check(step, metrics) if self._job.name == "rl" and step else []
        metrics |= {f"health/{alarm.name}": 1.0 for alarm in alarms}
        tracker.log(step, metrics)
        for alarm in alarms:
            self._progress.line(f"! {alarm.line}")
        losses = {name.partition("/")[2]: metrics[name] for name in ("train/loss", "val/loss") if name in metrics}
        stage.advance(1 if step else 0, **(losses if self._job.name == "sft" else figures(metrics)))
        if (fatal := self._monitor.fatal(alarms)) is not None:
            raise HealthError(f"{fatal.line}. The run ends here; its state is in {self._job.state}")

    def _failure(self, code: int, log_start: int) -> Exception:
        with contextlib.suppress(OSError, ValueError):
            error = json.loads((self._job.state / ERROR).read_text(encoding="utf-8"))
            return UserError(error["message"]) if error["kind"] == "user" else InfraError(error["message"])
        with self._log.open("rb") as log:
            log.seek(log_start)
            reason = last_error(log.read().decode(errors="replace"))
        if NONE_LEFT in reason:
            reason = "all trajectories of a step were lost; the sandbox or the sampling servers are down"
        reason = f": {reason}" if reason else ""
        return InfraError(
            f"verl ended with exit code {code}{reason}. What it printed is in {self._log}; once that is mended, the "
            "same command goes on from what was saved"
        )


def numbers_of(data: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of what verl logs, and whether an update was skipped."""
    found = {name: float(value) for name, value in data.items() if isinstance(value, int | float)}
    finite = {name: value for name, value in found.items() if math.isfinite(value)}
    # verl changes nothing where a gradient is not finite, prints that, and logs null
    norms = {model: f"{model}/grad_norm" for model in MODELS}
    return finite | {f"{m}/skipped": float(norm not in finite) for m, norm in norms.items() if norm in data}
