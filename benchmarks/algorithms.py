"""The algorithms against each other on the quickstart's task: one cold start a seed, then each algorithm from it with
the same steps, tasks and settings. Prints the table of docs/algorithms.md and writes results.json and algorithms.png.

    python benchmarks/algorithms.py --seeds 0 1 2 --out runs/algorithms
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from retool import evaluate, rl, sft
from retool.config import ALGORITHMS, SHIPPED_RECIPES, Recipe, load_recipe
from retool.data.sources import open_source
from retool.engine.runtime import load_runtime, open_sandbox
from retool.progress import Progress
from retool.protocols import Sandbox
from retool.store import RunFolder
from retool.types import ExecutionResult, ExecutionStatus

EXTRA: dict[str, list[str]] = {
    "dapo": ["rl.dynamic_sampling.max_rounds=3"],  # near the end 19 of 20 groups are all right
    "ppo": [
        "rl.critic.lam=0.95",
        "rl.critic.epochs=2",
        "rl.critic.optim.name=muon",
        "rl.critic.optim.muon_lr=0.005",
        "rl.critic.optim.lr=2e-3",
        "rl.critic.optim.warmup_steps=2",
    ],
}
"""Settings beyond the algorithm's own; the critic's were chosen on the rollouts of a GRPO run with seed 7."""
DEFAULT = ["grpo", "dapo", "dr_grpo", "gspo", "rloo", "ppo"]


def recipe_of(out: Path, seed: int, name: str, *overrides: str) -> Recipe:
    given = [f"run.out={out / f'seed{seed}'}", f"run.name={name}", f"run.seed={seed}", *overrides]
    return load_recipe(SHIPPED_RECIPES / "quickstart.toml", given)


def cold_start(out: Path, seed: int, progress: Progress) -> Path:
    """The seed's checkpoint after SFT; made once."""
    recipe = recipe_of(out, seed, "sft", "run.threads=1")
    return Path(sft.run(recipe, progress=progress)["checkpoint"])


class Flaky:
    """A sandbox that fails by itself now and then."""

    def __init__(self, sandbox: Sandbox, share: float, seed: int):
        self.sandbox, self.share, self.random = sandbox, share, random.Random(seed)

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        if self.random.random() < self.share:
            return ExecutionResult(ExecutionStatus.INFRA)
        return await self.sandbox.execute(code, timeout_s, session=session)

    def release(self, session: str) -> None:
        self.sandbox.release(session)

    async def close(self) -> None:
        pass  # the job closes the sandbox itself


def run(
    out: Path, seed: int, algorithm: str, start: Path, extra: list[str], faults: float, progress: Progress
) -> dict[str, Any]:
    """Train and evaluate one; a finished one is read from its folder."""
    name = f"{algorithm}-{faults:g}-faults" if faults else algorithm
    if faults:
        extra = [*extra, "sandbox.retries=0"]
    recipe = recipe_of(
        out,
        seed,
        name,
        "run.threads=1",
        f"rl.algorithm={algorithm}",
        f"model.path={start}",
        *EXTRA.get(algorithm, []),
        *extra,
    )
    folder = RunFolder(out / f"seed{seed}" / name)
    if "accuracy" in folder.summary():
        return folder.summary()
    folder.write_config(recipe)
    started = time.perf_counter()

    async def job() -> Any:
        runtime = load_runtime(recipe)
        tasks = open_source(recipe).eval_tasks(recipe.data.test_split, recipe.data.test_size)
        async with open_sandbox(recipe) as sandbox:
            flaky = Flaky(sandbox, faults, seed)
            summary = await rl.train(runtime, folder, flaky, progress=progress, label=f"{name}, seed {seed}")
            wall = time.perf_counter() - started
            groups = await evaluate.sample(runtime, tasks, sandbox, progress=progress)
            return summary, wall, evaluate.summarise(groups, recipe)

    summary, wall, found = asyncio.run(job())
    rows = folder.metrics()
    result = {
        "algorithm": name, "seed": seed, "accuracy": found["accuracy"], "ci95": found["ci95"],
        "call_rate": found["call_rate"], "wall_s": wall,
        "rollouts": sum(row["rollout/trajectories"] for row in rows),
        "infra": sum(row["infra/trajectories"] for row in rows),
        "explained": rows[-1].get("critic/vf_explained_var"),
    }  # fmt: skip
    folder.write_summary(summary | result)
    return result


def table(results: list[dict[str, Any]], algorithms: list[str]) -> str:
    lines = [
        "| algorithm | accuracy by seed | mean | call rate | rollouts | RL seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in algorithms:
        own = [r for r in results if r["algorithm"] == name]
        mean = {key: statistics.mean(r[key] for r in own) for key in ("accuracy", "call_rate", "rollouts", "wall_s")}
        by_seed = " / ".join(f"{r['accuracy']:.3f}" for r in own)
        lines.append(
            f"| `{name}` | {by_seed} | {mean['accuracy']:.3f} | {mean['call_rate']:.2f} | {mean['rollouts']:,.0f} | "
            f"{mean['wall_s']:.0f} |"
        )
    return "\n".join(lines)


def plot(out: Path, seeds: list[int], algorithms: list[str]) -> Path:
    """Accuracy of the rollouts by step, mean over the seeds, with the range between them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for name in algorithms:
        curves = [[row["acc/mean"] for row in RunFolder.open(out / f"seed{s}" / name).metrics()] for s in seeds]
        columns = list(zip(*curves, strict=False))
        steps = range(1, len(columns) + 1)
        (line,) = axes.plot(steps, [statistics.mean(c) for c in columns], label=name, linewidth=1.8)
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.10, color=line.get_color()
        )
    axes.set_xlabel("RL step")
    axes.set_ylabel("accuracy of the step's rollouts")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(out / "algorithms.png")
    return out / "algorithms.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithms", nargs="+", default=DEFAULT, choices=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--faults", type=float, default=0.0, help="share of executions that fail as infra, not retried")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every RL run")
    args = parser.parse_args()
    progress = Progress()
    results = []
    for seed in args.seeds:
        start = cold_start(args.out, seed, progress)
        for name in args.algorithms:
            results.append(run(args.out, seed, name, start, args.overrides, args.faults, progress))
            print(json.dumps(results[-1]), flush=True)
    names = list(dict.fromkeys(r["algorithm"] for r in results))
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, names))
    print(plot(args.out, args.seeds, names))


if __name__ == "__main__":
    main()
