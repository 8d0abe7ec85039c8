"""GRPO of the tiny model on both engines, from one cold start, at equal steps and settings: accuracy and seconds.

    .venv-verl/bin/python benchmarks/verl_vs_local.py --out runs-engines --plot docs/verl_vs_local.png

The cluster engine is the real verl, two Ray workers on this CPU, with the stand-ins of ``tests/verl``: 20 minutes in
all. Runs that are there already are not run again. Without verl nothing is run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests" / "verl"
sys.path.insert(0, str(TESTS))

import cpu  # noqa: E402

VALIDATED = "val-core/world/acc/mean@1"


def retool(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "retool.cli", *arguments], env=cpu.environment(), check=True)


def run(out: Path, steps: int) -> None:
    """Whatever is not there yet."""
    if not (out / "cold" / "summary.json").exists():
        retool("sft", "quickstart", f"run.out={out}", "run.name=cold")
    start = json.loads((out / "cold" / "summary.json").read_text())["checkpoint"]
    common = [f"run.out={out}", f"model.path={start}", f"rl.steps={steps}", "rl.eval_every=5", "rl.eval_size=240"]
    if not (out / "local" / "summary.json").exists():
        retool("rl", "quickstart", *common, "run.name=local")
    if not (out / "verl" / "summary.json").exists():
        cluster = ["cluster.gpus_per_node=2", "cluster.agent_workers=1", "model.device=cpu", "--engine", "verl"]
        retool("rl", "quickstart", *common, *cluster, "run.name=verl", *cpu.arguments(cpu.RL_OPTIONS))


def rows(out: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def report(out: Path) -> None:
    print(f"{'step':>6}{'local':>9}{'verl':>9}   held-out accuracy")
    local, verl = ({int(r["step"]): r.get(VALIDATED) for r in rows(out, name)} for name in ("local", "verl"))
    for step in sorted(step for step in verl if verl[step] is not None):
        here = f"{local[step]:9.3f}" if local.get(step) is not None else f"{'–':>9}"
        print(f"{step:>6}{here}{verl[step]:9.3f}")
    seconds = {
        name: [r["timing_s/step"] for r in rows(out, name) if "timing_s/step" in r] for name in ("local", "verl")
    }
    local_s, verl_s = (sum(seconds[name]) / len(seconds[name]) for name in ("local", "verl"))
    print(f"seconds a step: local {local_s:.1f}, verl {verl_s:.1f}; verl / local {verl_s / local_s:.1f}")


def plot(out: Path, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, colour in (("local", "tab:blue"), ("verl", "tab:orange")):
        found = rows(out, name)
        trained = [(r["step"], r["acc/mean"]) for r in found if "acc/mean" in r]
        held_out = [(r["step"], r[VALIDATED]) for r in found if VALIDATED in r]
        axes.plot(*zip(*trained, strict=True), color=colour, alpha=0.35, label=f"{name}: rollouts of the step")
        axes.plot(*zip(*held_out, strict=True), "o-", color=colour, label=f"{name}: held-out problems")
    axes.set(xlabel="GRPO step", ylabel="accuracy", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/engines"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        print("verl is not installed here; run it with the environment of make test-verl")
        return
    run(arguments.out.resolve(), arguments.steps)
    report(arguments.out)
    if arguments.plot:
        plot(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
