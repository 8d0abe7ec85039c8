"""What a test needs to run the real verl without a GPU: the environment, and the options that the CPU forces.

``plugin/`` holds the code that runs inside verl's processes. Run verl as a child process under a time limit: where a
Ray actor dies early the trainer may wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PLUGIN = Path(__file__).parent / "plugin"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a verl process, and of the Ray workers that it starts."""
    paths = [str(PLUGIN), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VERL_USE_EXTERNAL_MODULES": "retool_cpu_platform,retool_cpu_rollout",  # in every process, in this order
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # FSDP is registered for cuda and npu only; this is the registry's key, no more
        "HF_HUB_OFFLINE": "1",  # a test reads its own folders
        "TOKENIZERS_PARALLELISM": "false",  # verl sets it to true, and tokenizers then warn after every fork
        "OMP_NUM_THREADS": "1",  # a dozen processes share the cores
        "RAY_USAGE_STATS_ENABLED": "0",  # no network
        **(extra or {}),
    }


RL_OPTIONS: tuple[str, ...] = (
    "actor_rollout_ref.actor.strategy=fsdp2",  # FSDP1 needs a GPU; the reference follows the actor
    "++actor_rollout_ref.model.override_config.attn_implementation=sdpa",  # flash-attention is verl's default
    "++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",  # as exact as the rollout; bf16 is slower
    "++actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",  # of the entropy: compiling costs more than it saves
    "actor_rollout_ref.rollout.agent.num_workers=1",  # each is a process that imports verl; the default is eight
    "reward.num_workers=1",  # the same
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",  # the same
    "data.dataloader_num_workers=0",  # the default forks eight for training and eight for validation
    "++ray_kwargs.ray_init.address=local",  # else it joins any cluster that is up on this machine
    "ray_kwargs.ray_init.num_cpus=16",  # pretended: a rank asks for several cores, and Ray would wait for them for ever
    "++ray_kwargs.ray_init.num_gpus=2",  # pretended: at least trainer.n_gpus_per_node
    "++ray_kwargs.ray_init.include_dashboard=False",  # a process more
)
"""For ``verl.trainer.main_ppo``, after all other options."""

PPO_OPTIONS: tuple[str, ...] = (
    "critic.strategy=fsdp2",  # the critic follows nobody
    "++critic.fsdp.mixed_precision.param_dtype=fp32",
)
"""The same for the critic, beside ``RL_OPTIONS``; its attention is the plug-in's business."""

SFT_OPTIONS: tuple[str, ...] = (
    "trainer.device=cpu",  # verl corrects it for every accelerator but this one
    "engine.strategy=fsdp2",
    "++model.override_config.attn_implementation=sdpa",
    "++engine.mixed_precision.param_dtype=fp32",
    "data.num_workers=0",  # the default forks eight
)
"""For ``verl.trainer.sft_trainer``, after all other options."""

OF_FIELDS = ("trainer.device", "actor_rollout_ref.rollout.agent.num_workers", "ray_kwargs.ray_init.address")


def arguments(options: tuple[str, ...]) -> list[str]:
    """``--verl …`` for the command, less the options that a recipe's field sets: ``model.device``,
    ``cluster.agent_workers``, ``cluster.address``."""
    ours = [option for option in options if not option.lstrip("+").startswith(OF_FIELDS)]
    return [word for option in ours for word in ("--verl", option)]
