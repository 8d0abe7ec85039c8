"""A CPU as verl's accelerator, for tests: what lets the real verl 0.9.1 run where there is no GPU.

``VERL_USE_EXTERNAL_MODULES=retool_cpu_platform`` makes every process that imports verl import this first, and
``VERL_PLATFORM=cpu`` chooses it (``tests/verl/cpu.py`` sets both). verl knows CPU-only *processes*, not CPU-only
training: each shim below takes one wall away and says which. The last one is there for speed only. Nothing of this is
in ``src/``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """Without it verl falls back to ``nvidia`` and asks torch for NCCL."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module: ModuleType = torch.cpu

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:  # type: ignore[override]
        """Not an index: verl calls ``tensor.to(get_device_id())``, and for torch a bare 0 is ``cuda:0``."""
        return torch.device("cpu")

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Not CUDA_VISIBLE_DEVICES: nothing may ask torch for the GPUs that Ray pretends to have."""
        return "RETOOL_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        """Ray is told of GPUs that are not there (``ray_init.num_gpus``), so placement works as it does with GPUs."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _set_rng_state(state: torch.Tensor, *args: Any) -> None:
    torch.set_rng_state(state)


# Wall: ``get_torch_device().empty_cache()`` and its like, all over verl, do not exist in ``torch.cpu``. The module
# itself gets them, not a copy of it: verl leaves out memory and FLOP figures where ``get_torch_device() == torch.cpu``.
for _name, _function in {
    "empty_cache": _nothing,  # after every update and checkpoint
    "memory_allocated": _zero,  # aggressive_empty_cache
    "memory_reserved": _zero,
    "max_memory_allocated": _zero,  # the training metrics perf/max_memory_*
    "max_memory_reserved": _zero,
    "set_rng_state": _set_rng_state,  # loading a checkpoint
}.items():
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, _function)


_init_process_group = torch.distributed.init_process_group


def _init_without_duplicate(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """Wall: verl asks for ``cpu:gloo,{device}:{backend}``, and torch refuses a string that names the CPU twice."""
    _init_process_group("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_without_duplicate


def _critic_without_flash_attention(module: ModuleType) -> None:
    """Wall: ``load_valuehead_model`` hard-codes ``attn_implementation="flash_attention_2"`` for PPO's critic, whatever
    the config says. Of its two ways only the first is kept: the backbone with a head of one label."""

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            dtype=torch_dtype,
            config=model_config,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )

    module.load_valuehead_model = load_valuehead_model


def _offload_without_pinning(module: ModuleType) -> None:
    """Wall: under FSDP2 the KL reference always gets ``CPUOffloadPolicy(pin_memory=True)``, and only an accelerator can
    pin memory."""
    policy = module.CPUOffloadPolicy
    module.CPUOffloadPolicy = lambda pin_memory: policy(pin_memory=False)


POLL_S = 0.05


def _poll_often(module: ModuleType) -> None:
    """Not a wall, but 2 s for every step and validation: the trainer looks only so often whether all samples are there,
    and no option of the config reaches the interval."""
    buffer = module.ReplayBuffer
    buffer.__init__ = partialmethod(buffer.__init__, poll_interval=POLL_S)


class _AfterImport(MetaPathFinder):
    """Patches a module when verl imports it: importing them all here would cost every Ray worker the time."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]):
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = self._patches.pop(fullname, None)
        spec = PathFinder.find_spec(fullname, path, target) if patch else None
        if spec is None or spec.loader is None or patch is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(
    0,
    _AfterImport(
        {
            "verl.utils.model": _critic_without_flash_attention,
            "verl.workers.engine.fsdp.transformer_impl": _offload_without_pinning,
            "verl.trainer.ppo.v1.replay_buffer": _poll_often,
        }
    ),
)
