"""How strongly this version contains code, for ``retool doctor`` and the run folder."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from typing import Any

from retool.config import SandboxConfig
from retool.sandbox.jail import STEPS

TIER = "process"
"""The lowest tier: see what ``retool.sandbox.jail`` says is not covered."""


@dataclass(frozen=True)
class SandboxInfo:
    """What contains the code, and what it finds."""

    tier: str
    layers: tuple[str, ...]
    """Names of the jail's steps, in the order in which they are applied."""
    python: str
    """Version of the interpreter, e.g. ``3.11.7``."""
    modules: tuple[str, ...]
    """Imported before the code runs."""
    skipped: tuple[str, ...] = ()
    """Modules of the preload list that are not, each with the reason where it is known."""


def tier() -> str:
    """The tier's name."""
    return TIER


def describe(config: SandboxConfig | None = None) -> SandboxInfo:
    """What is to be expected here, without starting anything; ``LocalSandbox.info`` says what was found at start."""
    preload = (config or SandboxConfig()).preload
    present = tuple(name for name in preload if _is_installed(name))
    missing = tuple(name for name in preload if name not in present)
    return SandboxInfo(TIER, tuple(step.name for step in STEPS), platform.python_version(), present, missing)


def info_from_zygote(said: dict[str, Any]) -> SandboxInfo:
    """From a zygote's READY message."""
    return SandboxInfo(
        TIER, tuple(said["steps"]), platform.python_version(), tuple(said["loaded"]), tuple(said["skipped"])
    )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
