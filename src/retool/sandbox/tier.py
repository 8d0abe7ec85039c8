"""How strongly code is contained here, for ``retool doctor``, the run folder and every answer of the service."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

from retool.errors import SandboxBroken, SandboxRefused
from retool.sandbox.jail import TIERS, first_missing, tier_of


@dataclass(frozen=True)
class SandboxInfo:
    """What contains the code, and what it finds."""

    tier: str
    layers: tuple[str, ...]
    """Names of the jail's layers, in the order of its list."""
    python: str
    """Version of the interpreter, e.g. ``3.11.7``."""
    modules: tuple[str, ...]
    """Imported before the code runs."""
    skipped: tuple[str, ...] = ()
    """Modules of the preload list that are not, each with the reason where it is known."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layers that were tried and cannot be had here, each with the reason."""


def info_from_zygote(said: dict[str, Any]) -> SandboxInfo:
    """From a zygote's READY message.

    Raises:
        SandboxBroken: not even the weakest tier can be had."""
    tier = tier_of(said["layers"])
    if not tier:
        raise SandboxBroken(f"the sandbox cannot jail code here: {_reasons(said['missing'])}")
    modules, skipped = tuple(said["loaded"]), tuple(said["skipped"])
    return SandboxInfo(tier, tuple(said["layers"]), platform.python_version(), modules, skipped, said["missing"])


def check_tier(info: SandboxInfo, least: str) -> None:
    """Raises: SandboxRefused where the sandbox is weaker than ``least``; one line that says what is missing and how to
    get it."""
    if TIERS.index(info.tier) >= TIERS.index(least):
        return
    layer = first_missing(least, info.layers)
    name = layer.name if layer is not None else "?"
    mend = layer.mend if layer is not None else ""
    # Where the stronger tier failed as a whole, the layer that failed first is the one to mend.
    reason = info.missing.get(name) or _reasons(info.missing)
    raise SandboxRefused(
        f"sandbox.tier = {least!r}: this machine gives {info.tier!r}; the layer {name!r} is missing ({reason}). "
        f"To get it: {mend}; or set sandbox.tier = {info.tier!r}"
    )


def how_to_get_more(info: SandboxInfo) -> str:
    """What gives the next stronger tier; empty where there is none."""
    for tier in TIERS[TIERS.index(info.tier) + 1 :]:
        layer = first_missing(tier, info.layers)
        if layer is not None:
            return f"for tier {tier!r} (layer {layer.name!r}): {layer.mend}"
    return ""


def _reasons(missing: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in missing.items()) or "no reason given"
