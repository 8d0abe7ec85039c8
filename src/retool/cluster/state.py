"""verl's own state in the run folder: where a run goes on, and the model that it leaves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from retool.cluster.option import Job
from retool.cluster.process import last_error
from retool.errors import InfraError
from retool.store import RunFolder, seal, write_directory, write_file
from retool.store.checkpoints import remove

LATEST = "latest_checkpointed_iteration.txt"
"""verl's: the number of the last step that was saved whole."""
ADAPTER = "lora_adapter"
"""Where verl's merger leaves an adapter, beside the model that it was trained on."""
MARK = "fsdp_config.json"
"""What every set of shards has."""
STEP = re.compile(r"global_step_(\d+)")


def saved_step(state: Path) -> int:
    """The last step that verl saved whole; 0 where there is none."""
    try:
        return int((state / LATEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def whole_steps(job: Job) -> dict[int, Path]:
    """verl's checkpoints that can be loaded, by step: its own rotation leaves a folder's shell behind."""
    places = {"sft": [""], "rl": ["actor", "critic"] if job.recipe.rl.has_critic else ["actor"]}[job.name]
    return {
        int(match.group(1)): path
        for path in (job.state.iterdir() if job.state.is_dir() else ())
        if (match := STEP.fullmatch(path.name)) and all((path / place / MARK).is_file() for place in places)
    }


def logged_step(job: Job, folder: RunFolder) -> int:
    """The last step that the run folder knows all about."""
    steps = {int(row["step"]) for row in folder.metrics()}
    return max(steps if job.name == "sft" else steps & set(folder.trajectory_steps()), default=0)


def resume_point(job: Job, folder: RunFolder, complain: Callable[[str], None]) -> int:
    """The step after which the run goes on; 0: from the start. Older checkpoints than are to be kept go.

    verl saves a step before its metrics and trajectories are written. One that was saved and is not in the run folder
    is done again from the one before, where that is still there; else the run goes on after it, and ``complain``
    hears that they are missing.
    """
    latest, logged, found = saved_step(job.state), logged_step(job, folder), whole_steps(job)
    done = latest
    if latest > logged:
        done = max((step for step in found if step <= logged), default=latest)
        if done == latest:
            complain(f"step {latest} was saved and not logged: its metrics or trajectories are missing")
        else:
            write_file(job.state / LATEST, str(done))
    keep = job.recipe.run.keep_checkpoints
    older = sorted(step for step in found if step <= done)[:-keep] if keep else []
    remove(path for step, path in found.items() if step in older or step > done)
    return done


def export(job: Job, folder: RunFolder, steps: int) -> None:
    """verl's last state as a model in Hugging Face layout, in ``checkpoints/`` (verl's merger, which writes bfloat16),
    and the summary.

    Raises:
        InfraError: the merger failed; verl's state is as it was.
    """
    step = saved_step(job.state)
    path = folder.checkpoint_path(step)
    if not step:
        raise InfraError(f"verl saved no step in {job.state}; its output is in {job.state / 'log.txt'}")
    if step not in folder.checkpoint_steps():
        source = job.state / f"global_step_{step}"
        source = source / "actor" if job.name == "rl" else source
        with write_directory(path) as aside:
            merge(source, aside)
            seal(aside)
    if folder.summary().get("checkpoint") != str(path):
        folder.write_summary({"steps": steps, "checkpoint": str(path), "engine": "verl"})


def merge(source: Path, target: Path) -> None:
    """verl's sharded state ``source`` as one model in ``target``."""
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(source), "--target_dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = last_error(done.stdout + done.stderr) or f"exit code {done.returncode}"
        raise InfraError(f"verl's merger failed on {source}: {reason}")
    if (target / ADAPTER).is_dir():
        _merge_adapter(target)
    # what the merger does not bring along
    for file in (source / "huggingface").glob("*.jinja"):
        if not (target / file.name).exists():
            shutil.copy(file, target / file.name)


def _merge_adapter(folder: Path) -> None:
    """Put the adapter in ``folder`` into the model beside it; the adapter stays."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    PeftModel.from_pretrained(base, folder / ADAPTER).merge_and_unload().save_pretrained(folder)
