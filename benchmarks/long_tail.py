"""The long tail of rollouts: a few programs that take long hold up a whole step, unless more groups are begun than are
needed and what is not done goes on in the next step.

    python benchmarks/long_tail.py --steps 8

The quickstart's task after its cold start, on a sandbox in which a share of the programs takes seconds longer. Prints
the mean seconds of a step's rollout for plain rollouts and for partial ones (``rl.tail``), their ratio, and what the
latter cost: how old trajectories get, and the groups that a step leaves for the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from retool import rl, sft
from retool.config import SHIPPED_RECIPES, load_recipe
from retool.engine.runtime import load_runtime, open_sandbox
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.store import RunFolder
from retool.types import ExecutionResult

MODES = {
    "plain": [],
    "partial": ["rl.tail.oversample=1.5", "rl.tail.partial=true"],
}


class Slow:
    """A sandbox in which some programs take longer."""

    def __init__(self, sandbox: Sandbox, share: float, seconds: float):
        self.sandbox, self.share, self.seconds, self.random = sandbox, share, seconds, random.Random(0)

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        if self.random.random() < self.share:
            await asyncio.sleep(self.seconds)
        return await self.sandbox.execute(code, timeout_s, session=session)

    def release(self, session: str) -> None:
        self.sandbox.release(session)

    async def close(self) -> None:
        pass  # the job closes the sandbox itself


def measure(out: Path, start: Path, mode: str, args: argparse.Namespace) -> list[dict[str, float]]:
    recipe = load_recipe(
        SHIPPED_RECIPES / "quickstart.toml",
        [
            f"run.out={out}",
            f"run.name={mode}",
            "run.threads=1",
            f"model.path={start}",
            f"rl.steps={args.steps}",
            *MODES[mode],
        ],
    )
    folder = RunFolder(out / mode)

    async def job() -> Any:
        async with open_sandbox(recipe) as sandbox:
            slow = Slow(sandbox, args.share, args.seconds)
            return await rl.train(load_runtime(recipe), folder, slow, progress=Progress(), label=mode)

    asyncio.run(job())
    return folder.metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.03, help="of the programs that take longer")
    parser.add_argument("--seconds", type=float, default=4.0, help="how much longer")
    parser.add_argument("--start", type=Path, help="a checkpoint after the cold start; none: it is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        start = args.start
        if start is None:
            cold = load_recipe(SHIPPED_RECIPES / "quickstart.toml", [f"run.out={out}", "run.name=sft"])
            start = Path(sft.run(cold, progress=Progress())["checkpoint"])
        found = {mode: measure(out, start, mode, args) for mode in MODES}

    def mean(mode: str, name: str) -> float:
        return statistics.mean(row.get(name, 0.0) for row in found[mode][1:])  # the first step warms up

    for mode in MODES:
        print(
            f"{mode:8} rollout {mean(mode, 'timing_s/rollout'):5.2f} s a step, "
            f"{mean(mode, 'tokens/sampled'):,.0f} tokens, "
            f"staleness mean {mean(mode, 'training/staleness_mean'):.2f}, most "
            f"{max(row['training/staleness_max'] for row in found[mode]):.0f}, groups left over "
            f"{mean(mode, 'tail/groups_left'):.1f}, accuracy at the end {found[mode][-1]['acc/mean']:.2f}"
        )
    ratio = mean("plain", "timing_s/rollout") / mean("partial", "timing_s/rollout")
    print(f"a step's rollout with partial trajectories is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
