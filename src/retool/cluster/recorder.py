"""What verl does not keep: a step's trajectories as they were, their metrics under our names, the run folder's files.

One actor of a run, on the node where the run folder is, takes every trajectory as it ends. It holds those of two steps
at the most, one that is made and one that is written: 1.2 MB for one of 16,000 tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from retool.cluster.main import ERROR
from retool.config import Recipe, make_recipe
from retool.errors import InfraError
from retool.metrics import evaluation_summary, rollout_metrics, validation_metrics
from retool.rollout import make_group
from retool.store import RunFolder, write_file
from retool.types import Trajectory, TrajectoryGroup

NAME, RUNNER = "retool_recorder", "retool_runner"
"""In the Ray namespace of the job, which no other job shares."""


class Recorder:
    """The actor's body: plain Python, so that a test needs no Ray.

    Args:
        recipe: as a tree, secrets included; workers ask for it here.
        folder: the run folder.
        job: ``rl`` or ``evaluate``.
        here: where the command was typed; a user's own modules are looked for there.
    """

    def __init__(self, recipe: Mapping[str, Any], folder: str, job: str, here: str = "") -> None:
        self._tree, self._recipe, self._job = dict(recipe), make_recipe(dict(recipe)), job
        self._folder, self._here = RunFolder.open(folder), here
        self._trained: dict[str, list[tuple[int, Trajectory]]] = {}
        self._validated: dict[str, list[tuple[int, Trajectory]]] = {}
        self._counts: Counter[str] = Counter()
        self._restarts: dict[str, int] = {}
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def told(self) -> tuple[dict[str, Any], str]:
        """``recipe`` and ``here``."""
        return self._tree, self._here

    def add(
        self,
        uid: str,
        place: int,
        trajectory: Trajectory,
        counts: Mapping[str, float],
        *,
        validation: bool,
        restarts: tuple[str, int] = ("", 0),
    ) -> None:
        """Take a graded trajectory.

        Args:
            uid: verl's name for the group.
            place: the task's row in the data, by which groups are put in order.
            counts: of its grading, to be summed over the step.
            restarts: the node, and how often its sandbox has been restarted as far as the worker knows.
        """
        node, number = restarts
        self._restarts[node] = max(number, self._restarts.get(node, 0))
        kept = self._validated if validation else self._trained
        kept.setdefault(uid, []).append((place, trajectory))
        if not validation:
            self._counts.update(counts)

    def fail(self, kind: str, message: str) -> None:
        """Tell the launcher why the run ends; the first reason counts.

        Args:
            kind: ``user`` or ``infra``.
        """
        file = self._folder.path / "verl" / ERROR
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_file(file, json.dumps({"kind": kind, "message": message}))

    def end_step(self, step: int, advantages: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics under our names. Its trajectories are forgotten, and written while the next step goes on
        (15 ms for one of 16,000 tokens); an error of the step before is raised here.

        Args:
            advantages: by ``uid_sample``, of those that were learnt from.
        """
        for uid, members in self._trained.items():
            for _, trajectory in members:
                trajectory.advantage = advantages.get(f"{uid}_{trajectory.sample}")
        groups = _groups(self._trained)
        self._trained = {}
        metrics = rollout_metrics(groups) | dict(self._counts)
        metrics["infra/sandbox_restarts"] = float(sum(self._restarts.values()))
        self._counts = Counter()
        self.flush()
        self._writing = self._writer.submit(self._folder.write_step, step, groups)
        return metrics

    def flush(self) -> None:
        """Wait until what was to be written is.

        Raises:
            InfraError: it could not be.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise InfraError(
                f"trajectories could not be written to {self._folder.path} ({error.strerror or error})"
            ) from error

    def end_validation(self, step: int) -> dict[str, float]:
        """The metrics of a validation under our names. Where the job is an evaluation, its trajectories and summary are
        written too."""
        groups, config = _groups(self._validated), self._recipe.eval
        self._validated = {}
        if not groups:  # another agent loop than ours
            return {}
        if self._job == "evaluate":
            self._folder.write_eval("model", groups)
            summary = evaluation_summary(groups, config.k, config.bootstrap, self._recipe.run.seed)
            model, seed = self._recipe.model.path, self._recipe.run.seed
            self._folder.write_summary({"eval": summary, "model": model, "seed": seed})
        return validation_metrics(groups, config.k, config.bootstrap, step)


def _groups(kept: dict[str, list[tuple[int, Trajectory]]]) -> list[TrajectoryGroup]:
    """In the order of the data, trajectories in the order of their samples."""
    groups = []
    for _, members in sorted(kept.items(), key=lambda item: item[1][0][0]):
        trajectories = sorted((t for _, t in members), key=lambda t: t.sample)
        groups.append(make_group(trajectories[0].task, trajectories))
    return groups


def secret_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a tree that ``make_recipe`` takes, for workers with another working folder; its secrets are
    included, so it is not for a file."""
    tree = recipe.model_dump(mode="json")
    if recipe.rollout.prompt_file:
        tree["rollout"]["prompt_file"] = str(Path(recipe.rollout.prompt_file).resolve())
    return tree
