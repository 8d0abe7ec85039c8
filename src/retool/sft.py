"""Supervised fine-tuning on demonstrations, the cold start: loss on the assistant's tokens only."""

from __future__ import annotations

import random
import time
from typing import Any

from retool.algo.batch import Sample
from retool.config import Recipe
from retool.data.conversations import encode
from retool.data.sources import open_source
from retool.engine.checkpoint import load_state, save_checkpoint
from retool.engine.learner import Learner, supervised
from retool.engine.model import use_threads
from retool.engine.runtime import Runtime, load_runtime
from retool.errors import DataError
from retool.formats.chat import ChatFormat
from retool.progress import Progress
from retool.store import RunFolder
from retool.store.best import Best
from retool.store.resume import RunLock, begin_run, find_checkpoint, finished, step_of
from retool.trackers import check_trackers, open_trackers
from retool.types import Conversation


def run(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """The job: load, train, leave a checkpoint. Returns what ``summary.json`` holds."""
    check_trackers(recipe)
    with RunLock(recipe) as lock:
        checkpoint = find_checkpoint(recipe, "sft", progress.line)
        runtime = load_runtime(recipe, checkpoint)
        folder = begin_run(recipe, step_of(checkpoint))
        lock.take()
        return train(runtime, folder, progress=progress, done=step_of(checkpoint))


def train(runtime: Runtime, folder: RunFolder, *, progress: Progress, done: int = 0) -> dict[str, Any]:
    """Fine-tune ``runtime.model`` in place.

    Args:
        done: steps that the model has behind it; the trainer's state of that step is in the folder.
    """
    config = runtime.recipe.sft
    seed = runtime.recipe.run.seed
    folder.write_environment(job="sft", seed=seed, device=str(runtime.model.device))
    conversations, held_out = open_source(runtime.recipe).conversations(config.steps * config.batch_size)
    samples, too_long = samples_of(conversations, runtime.fmt, config.max_tokens)
    held_out_samples, _ = samples_of(held_out, runtime.fmt, config.max_tokens)
    if not samples:
        raise DataError(f"sft.max_tokens = {config.max_tokens}: all {too_long} conversations are longer; raise it")
    steps = config.steps or -(-len(samples) * config.epochs // config.batch_size)
    learner = Learner(runtime.model, config.optim, total_steps=steps, micro_batch_tokens=config.micro_batch_tokens)
    best = Best("val/loss", higher=False)
    if done:
        state, _ = load_state(folder.checkpoint_path(done))
        learner.load_state_dict(state["learner"])
        best.resume(state["best"], folder)
    if done >= steps:
        progress.line(f"SFT: all {steps} steps are done already, in {folder.path}")
        return finished(folder, done)
    if too_long:
        progress.line(
            f"{too_long} of {len(conversations)} conversations have over {config.max_tokens} tokens: left out"
        )

    use_threads(runtime.recipe.run, sandbox=False)
    tracker = open_trackers(folder, runtime.recipe, progress.line, job="sft", done=done)
    summary: dict[str, Any] = {"steps": steps, "conversations": len(samples), "too_long": too_long}
    with progress.stage("SFT", total=steps) as stage:
        stage.advance(done)
        for step in range(done, steps):
            started = time.perf_counter()
            result = learner.update(batch_of(samples, step, config.batch_size, seed), supervised)
            metrics = {
                "train/loss": result["loss"],
                "train/lr": result["lr"],
                "train/grad_norm": result["grad_norm"],
                "timing_s/step": time.perf_counter() - started,
            }
            last = step + 1 == steps
            if held_out_samples and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                metrics["val/loss"] = summary["val_loss"] = learner.evaluate_loss(held_out_samples)
            tracker.log(step + 1, metrics)
            stage.advance(
                **{name.partition("/")[2]: metrics[name] for name in ("train/loss", "val/loss") if name in metrics}
            )
            better = best.update(step + 1, metrics)
            if last or better or (config.save_every and (step + 1) % config.save_every == 0):
                path = save_checkpoint(
                    folder, step + 1, runtime.recipe, runtime.model, runtime.tokenizer,
                    {"learner": learner.state_dict()}, best=best, last=last,
                )  # fmt: skip
                summary["checkpoint"] = str(path)
    tracker.close()
    folder.write_summary(summary)
    return summary


def samples_of(conversations: list[Conversation], fmt: ChatFormat, max_tokens: int) -> tuple[list[Sample], int]:
    """Conversations to learn from, and how many were too long (see ``data.conversations.encode``)."""
    found, too_long = encode(conversations, fmt, max_tokens)
    return [Sample(encoded.ids_T, encoded.mask_T) for encoded in found], too_long


def batch_of(samples: list[Sample], step: int, size: int, seed: int) -> list[Sample]:
    """The samples of a step, a function of the seed and the step alone: shuffled epochs, one after the other."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, len(samples))
        if epoch not in orders:
            orders[epoch] = random.Random(f"sft/{seed}/{epoch}").sample(range(len(samples)), len(samples))
        chosen.append(samples[orders[epoch][index]])
    return chosen
