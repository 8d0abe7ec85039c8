"""Which checkpoint is the best one by validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retool.store.folder import RunFolder


@dataclass
class Best:
    """The best value so far of one metric: a part of a run's state.

    Args:
        prefix: of the metric's name, or the whole of it; of several the first one.
        higher: whether more is better.
    """

    prefix: str
    higher: bool = True
    found: dict[str, Any] | None = None
    """``step``, ``metric`` and ``value``."""

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether this step is better than all before it."""
        name = next((n for n in metrics if n.startswith(self.prefix) and math.isfinite(metrics[n])), None)
        if name is None:
            return False
        value, old = metrics[name], self.found["value"] if self.found else None
        if old is not None and (value <= old if self.higher else value >= old):
            return False
        self.found = {"step": step, "metric": name, "value": value}
        return True

    def resume(self, found: dict[str, Any] | None, folder: RunFolder) -> None:
        """Take up what a checkpoint knows, as far as the best one is still there."""
        self.found = found if found and folder.checkpoint_path(found["step"]).exists() else None
        self.publish(folder)

    def publish(self, folder: RunFolder) -> None:
        """Into ``best.json``."""
        folder.write_best(self.found)
