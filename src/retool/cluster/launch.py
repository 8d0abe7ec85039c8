"""A job on the cluster engine: prepare, start verl, watch it, keep what it leaves.

The launcher owns the run folder. verl runs in a child process, writes its state to ``RUN/verl`` and its output to
``RUN/verl/log.txt``; the recorder writes trajectories; what verl logs comes back here and becomes ``metrics.jsonl``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retool.cluster.data import EVAL, TRAIN, with_room, write_tasks
from retool.cluster.main import TOKEN, compose
from retool.cluster.option import CONFIGS, Job, model_path
from retool.cluster.options import overrides_of
from retool.cluster.refusals import notes_of
from retool.cluster.state import export, resume_point, saved_step
from retool.cluster.watch import NAMES, Watch
from retool.config import Recipe
from retool.data.sets import is_hub_name
from retool.data.sources import open_source
from retool.errors import ConfigError, DataError, UserError
from retool.formats import make_format
from retool.formats.chat import ChatFormat
from retool.formats.tokenizer import load_tokenizer
from retool.grading.rewards import find_reward
from retool.progress import Progress
from retool.store.resume import RunLock, begin_run, find_run, refuse_changes
from retool.trackers import check_trackers

VERL = "0.9."
"""The versions that this engine is written for and tested with."""
VALIDATES = "trainer.val_before_train="
CONNECT_S = 5.0
EXTRA_ROUNDS = 3
"""Rows for dynamic sampling, as a multiple of what a run without it needs; after them verl begins the file anew."""
WEIGHTS = ("*.safetensors", "*.bin")


def run(recipe: Recipe, *, job: str, extra: Sequence[str] = (), progress: Progress) -> dict[str, Any]:
    """Run ``job`` (``sft``, ``rl`` or ``evaluate``) on verl. Returns what ``summary.json`` holds.

    Args:
        extra: verl's own options, ``key=value``.

    Raises:
        UserError: a mistake in the recipe, the options or the data; nothing has been started.
        InfraError: verl ended with an error; what it saved is whole.
        HealthError: an alarm of ``health.stop_on``.
    """
    check_trackers(recipe)
    find_reward(recipe.rl.reward)
    path, name = Path(recipe.run.out) / recipe.run.name, NAMES[job]
    what = Job(job, recipe, path.resolve())
    overrides = overrides_of(what, extra)
    check_model(recipe)
    check_address(recipe)
    check_verl()
    compose(overrides, CONFIGS[job])
    with RunLock(recipe) as lock:
        earlier = find_run(recipe, name, engine="verl")
        done = 0
        if earlier and job != "evaluate" and saved_step(what.state):
            refuse_changes(earlier, recipe, name)
            done = resume_point(what, earlier, progress.line)
        fmt = make_format(recipe.rollout, load_tokenizer(recipe.model.tokenizer or model_path(recipe)))
        write = read_data(what, fmt, progress.line)
        folder = begin_run(recipe, done)
        lock.take()
        what.state.mkdir(exist_ok=True)
        folder.write_environment(
            job=name,
            seed=recipe.run.seed,
            device=f"verl, {recipe.cluster.nodes} × {recipe.cluster.gpus_per_node}",
            engine="verl",
            verl_options=overrides,
        )
        steps = write()
        if done and job == "rl":  # the validation after this step is in the run folder already
            overrides = [line for line in overrides if not line.startswith(VALIDATES)] + [f"{VALIDATES}false"]
        for note in notes_of(what):
            progress.line(f"note: {note}")
        if done < steps:
            Watch(what, folder, done, steps, progress).run(overrides, {TOKEN: recipe.sandbox.token})
        else:
            progress.line(f"all {steps} steps are done already, in {folder.path}")
        if job != "evaluate":
            export(what, folder, steps)
        return folder.summary()


# --- what must be in order before anything starts ---------------------------------------------------------------------


def check_verl() -> None:
    """Raises UserError: verl is not installed, or another version."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise UserError("--engine verl: verl is not installed; pip install 'retool[verl]' -c constraints-verl.txt")
    version = importlib.metadata.version("verl")
    if not version.startswith(VERL):
        raise UserError(f"--engine verl: verl {version} is installed; this needs {VERL}x (constraints-verl.txt)")


def check_model(recipe: Recipe) -> None:
    """Raises ConfigError: ``model.path`` is neither a whole model's folder nor a hub name."""
    path = Path(model_path(recipe))
    if not path.is_dir():
        if not is_hub_name(recipe.model.path):
            raise ConfigError(f"model.path = {recipe.model.path!r}: there is no such folder; give one, or a hub name")
        return
    missing = "" if (path / "config.json").is_file() else "config.json"
    if not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        missing = missing or "weights (*.safetensors)"
    if missing:
        raise ConfigError(f"model.path = {recipe.model.path!r}: the folder has no {missing}; give a whole model's")


def check_address(recipe: Recipe) -> None:
    """Raises ConfigError: nothing answers where Ray should be, or several nodes are asked for and no Ray is named."""
    address, field = recipe.cluster.address, "cluster.address"
    if not address:
        address, field = os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    if not address and recipe.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes = {recipe.cluster.nodes}: a Ray of the run's own has this machine only; start Ray on all "
            "of them, and give cluster.address = HEAD:6379"
        )
    if "://" in address:
        raise ConfigError(f"{field} = {address!r}: Ray Client cannot carry a run; give the head's HOST:6379")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"{field} = {address!r}: no Ray answers there ({error.strerror or error}); start one with "
            "'ray start --head', or leave it empty for a Ray of the run's own"
        ) from None


# --- data -------------------------------------------------------------------------------------------------------------


def read_data(job: Job, fmt: ChatFormat, complain: Callable[[str], None]) -> Callable[[], int]:
    """Read the job's data, so that a mistake in it is told before there is a run folder; what is returned writes it
    into the folder and says how many steps the job has.

    Raises:
        DataError: see ``open_source`` and ``with_room``.
    """
    recipe, source = job.recipe, open_source(job.recipe)
    if job.name == "sft":
        from retool.cluster.sft import prepare

        return prepare(job, fmt, complain)
    if job.name == "evaluate":
        validation = source.eval_tasks(recipe.data.test_split, recipe.data.test_size)
        training, steps = validation, 1
    else:
        rounds = EXTRA_ROUNDS if recipe.rl.dynamic_sampling.enabled else 1
        steps = recipe.rl.steps
        training = source.train_tasks(0, rounds * steps * recipe.rl.prompts)
        # verl wants a file to validate on, also where it never will
        validation = (
            source.eval_tasks(recipe.rl.eval_split, recipe.rl.eval_size) if recipe.rl.eval_every else training[:1]
        )
    training = with_room(training, fmt, recipe.rollout, complain)
    if job.name == "rl" and len(training) < recipe.rl.prompts:
        raise DataError(
            f"data.train = {recipe.data.train!r}: {len(training)} tasks for rl.prompts = {recipe.rl.prompts}"
        )
    validation = with_room(validation, fmt, recipe.rollout, complain)

    def write() -> int:
        write_tasks(job.state / "train.parquet", training, TRAIN)
        write_tasks(job.state / "val.parquet", validation, EVAL)
        return steps

    return write
