"""verl's trainer with our eyes: at the end of each step and each validation the recorder's metrics join verl's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from retool.cluster.recorder import NAME, RUNNER, Recorder, secret_tree
from retool.config import Recipe

PADDING = "pad"
"""What verl's rows that only fill a batch are called by."""


class Recording:
    """Mixed into one of verl's trainers."""

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], timing_raw: Any, **where: Any) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **where)  # type: ignore[misc]
        advantages, gaps = learnt_from(batch)
        metrics.update(gaps)
        metrics.update(ray.get(ray.get_actor(NAME).end_step.remote(where["global_steps"], advantages)))

    def _val_metrics_update(self, *found: Any, **more: Any) -> dict[str, float]:
        """verl counts a lost trajectory as a wrong one; ours, of the same names, leave it out."""
        metrics: dict[str, float] = super()._val_metrics_update(*found, **more)  # type: ignore[misc]
        step: int = self.global_steps  # type: ignore[attr-defined]
        metrics.update(ray.get(ray.get_actor(NAME).end_validation.remote(step)))
        return metrics


def learnt_from(batch: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The advantage of each trajectory of a batch (the mean of its tokens') by ``uid_sample``, and how far the actor's
    log-probabilities were from the sampler's before any weight changed."""
    fields = ["advantages", "response_mask", "old_log_probs", "rollout_log_probs"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    advantages: dict[str, float] = {}
    gaps = []
    for key, *row in zip(batch.keys, *(data[field].unbind() for field in fields), strict=True):
        if key.startswith(PADDING):
            continue
        advantages_T, mask_T, old_T, rollout_T = row
        learnt = mask_T.bool()
        if not learnt.any():
            continue
        advantages[key.rpartition("_")[0]] = float(advantages_T[learnt].mean())
        gaps.append((old_T - rollout_T)[learnt].abs())
    if not gaps:
        return {}, {}
    gap_N = torch.cat(gaps)
    return advantages, {
        "training/rollout_logprob_gap_mean": float(gap_N.mean()),
        "training/rollout_logprob_gap_max": float(gap_N.max()),
    }


def _here() -> NodeAffinitySchedulingStrategy:
    """On this node and no other: it is the one with the run folder."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Runner(TaskRunnerV1.__ray_metadata__.modified_class):  # type: ignore[misc]
    """verl's own task runner, whose trainer records."""

    def __init__(self, *recording: Any) -> None:
        super().__init__()
        self._recording = recording

    def run(self, config: Any) -> None:
        recorder = ray.remote(Recorder).options(name=NAME, num_cpus=0, scheduling_strategy=_here())
        self._recorder = recorder.remote(*self._recording)
        mode = config.trainer.v1.trainer_mode
        TRAINER_REGISTRY[mode] = type("RecordingTrainer", (Recording, TRAINER_REGISTRY[mode]), {})
        try:
            super().run(config)
        finally:
            ray.get(self._recorder.flush.remote())


class RunnerHere:
    """What ``run_ppo`` takes for a task runner's class: an actor on this node, where the run folder is."""

    def __init__(self, recipe: Recipe, folder: Path, job: str) -> None:
        self._arguments = secret_tree(recipe), str(folder.resolve()), job, os.getcwd()

    def remote(self) -> Any:
        variables = {name: os.environ[name] for name in ("VERL_FILE_LOGGER_PATH",) if name in os.environ}
        options = {
            "name": RUNNER,
            "num_cpus": 0,
            "scheduling_strategy": _here(),
            "runtime_env": {"env_vars": variables},
        }
        return ray.remote(Runner).options(**options).remote(*self._arguments)
