"""How strongly code is contained here, for ``retool doctor``, the run folder and every answer of the service."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

from retool.errors import SandboxBroken, SandboxRefused
from retool.sandbox.jail import LAYERS, TIERS, Layer, tier_of


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
    layer, reason = _what_failed(least, info)
    raise SandboxRefused(
        f"sandbox.tier = {least!r}: this machine gives {info.tier!r}; the layer {layer.name!r} is missing ({reason}). "
        f"To get it: {layer.mend}; or set sandbox.tier = {info.tier!r}"
    )


def _what_failed(tier: str, info: SandboxInfo) -> tuple[Layer, str]:
    """The layer that keeps ``tier`` out of reach, and why: the one that was tried and failed, before those that were
    not tried any more because of it."""
    lacking = [layer for layer in LAYERS if tier in layer.tiers and layer.name not in info.layers]
    tried = [layer for name in info.missing for layer in lacking if layer.name == name]
    layer = (tried or lacking)[0]
    return layer, info.missing.get(layer.name, "it was not tried")


def how_to_get_more(info: SandboxInfo) -> str:
    """What gives the next stronger tier; empty where there is none."""
    for tier in TIERS[TIERS.index(info.tier) + 1 :]:
        layer, _ = _what_failed(tier, info)
        return f"for tier {tier!r} (layer {layer.name!r}): {layer.mend}"
    return ""


def _reasons(missing: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in missing.items()) or "no reason given"
