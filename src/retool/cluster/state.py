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
STEP = re.compile(r"global_step_(\d+)")


def saved_step(state: Path) -> int:
    """The last step that verl saved whole; 0 where there is none."""
    try:
        return int((state / LATEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def resume_point(state: Path, folder: RunFolder, complain: Callable[[str], None]) -> int:
    """The step after which the run goes on; 0: from the start. verl saves a step before it logs it. One that was saved
    and not logged is done again from the one before, where that is still there; else the run goes on after it, and
    ``complain`` hears that its metrics and trajectories are missing."""
    latest = saved_step(state)
    logged = max((int(row["step"]) for row in folder.metrics()), default=0)
    if latest <= logged:
        return latest
    found = {int(match.group(1)): path for path in state.iterdir() if (match := STEP.fullmatch(path.name))}
    earlier = max((step for step in found if step <= logged), default=0)
    if not earlier:
        complain(f"step {latest} was saved and not logged: its metrics and trajectories are missing")
        return latest
    write_file(state / LATEST, str(earlier))
    remove(path for step, path in found.items() if step > earlier)
    return earlier


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
