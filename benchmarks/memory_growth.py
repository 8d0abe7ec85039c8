"""Memory of a long RL run: the quickstart's step, many times over, and what the process holds after each.

    python benchmarks/memory_growth.py --steps 60

The model is fine-tuned first, as in the quickstart, so that trajectories call the tool and both kinds of turn occur.
*trainer* is the resident memory of this process; *sandbox* is the proportional share (PSS) of its zygote and their
children. The slope is the median of the slopes between any two steps after the warm-up (Theil and Sen): what an
allocator holds on to after one large batch moves it little, and memory that grows with every step moves it fully.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from retool import rl, sft
from retool.config import load_recipe, recipe_path
from retool.engine.runtime import load_runtime, open_sandbox
from retool.progress import Progress
from retool.store import RunFolder

KIB, MIB = 1024, 1024 * 1024
WARM_UP_SHARE = 1 / 3
"""Of the steps: until then the allocator is still finding the size of the largest batch."""
EVERY = 10


def own_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / KIB


def descendants(root: int) -> list[int]:
    """Processes below ``root``; those that end meanwhile are passed over."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            # The command's name, in parentheses, may hold spaces and parentheses of its own.
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: list[int] = []
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found += frontier
    return found


def below_mb() -> tuple[float, int]:
    """Proportional share of memory of this process's descendants, and how many there are."""
    total, count = 0, 0
    for pid in descendants(os.getpid()):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        count += 1
    return total / KIB, count


class Watched(RunFolder):
    """The seam at which every step passes once, near its end: notes what is held then."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.trainer_mb: list[float] = []
        self.sandbox_mb: list[float] = []

    def write_step(self, step: int, groups: Any) -> Path:
        written = super().write_step(step, groups)
        sandbox, processes = below_mb()
        self.trainer_mb.append(own_mb())
        self.sandbox_mb.append(sandbox)
        if step == 1 or step % EVERY == 0:
            print(f"{step:6}{self.trainer_mb[-1]:12.1f}{sandbox:12.1f}{processes:12}", flush=True)
        return written


def slope(values: list[float]) -> float:
    """Growth a step after the warm-up, Theil–Sen's estimate."""
    later = list(enumerate(values))[round(len(values) * WARM_UP_SHARE) :]
    return statistics.median((v - u) / (b - a) for (a, u), (b, v) in combinations(later, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="RL steps; at least 6")
    parser.add_argument("--sft-steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the quickstart's recipe")
    args = parser.parse_args()
    if args.steps < 6:
        parser.error("--steps: too few for a slope, give at least 6")
    with tempfile.TemporaryDirectory() as out:
        settings = [f"sft.steps={args.sft_steps}", f"rl.steps={args.steps}", *args.overrides]
        recipe = load_recipe(recipe_path("quickstart"), settings)
        runtime = load_runtime(recipe)
        print(f"model loaded: {own_mb():.1f} MB", flush=True)
        sft.train(runtime, RunFolder(Path(out) / "sft"), progress=Progress(quiet=True))
        print(f"after {args.sft_steps} steps of SFT: {own_mb():.1f} MB\n", flush=True)
        folder = Watched(Path(out) / "rl")

        async def job() -> None:
            print(f"{'step':>6}{'trainer MB':>12}{'sandbox MB':>12}{'processes':>12}")
            async with open_sandbox(recipe) as sandbox:
                await rl.train(runtime, folder, sandbox, progress=Progress(quiet=True))

        asyncio.run(job())
    for name, values in (("trainer", folder.trainer_mb), ("sandbox", folder.sandbox_mb)):
        highest = max(values)
        print(
            f"{name}: {100 * slope(values):+.1f} MB in 100 steps after the warm-up, "
            f"at most {highest:.0f} MB (step {values.index(highest) + 1})"
        )
    print(f"peak of the trainer: {peak_mb():.0f} MB")


if __name__ == "__main__":
    main()
