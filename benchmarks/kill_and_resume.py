"""A run that is killed again and again ends as one that never was: metrics and weights equal bit by bit.

    python benchmarks/kill_and_resume.py --kills 30

For GRPO with dynamic sampling and for PPO: one run undisturbed, one killed with SIGKILL at random instants (a third of
them while a checkpoint is being written, the others at any time, also while code runs) and typed again each time. After
each kill no process of the run may be left, and every checkpoint that bears its name must be whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from retool import sft
from retool.config import SHIPPED_RECIPES, load_recipe
from retool.progress import Progress
from retool.store import RunFolder, read_metrics
from retool.store.checkpoints import CHECKSUMS, fault_of

RECIPE = SHIPPED_RECIPES / "quickstart.toml"
COMMON = [
    "run.deterministic=true", "run.threads=1", "rl.steps=8", "rl.prompts=4", "rl.group_size=4",
    "rl.minibatch_prompts=2",
    "rl.save_every=1", "rl.eval_every=4", "rl.eval_size=8", "sandbox.workers=2",
]  # fmt: skip
RUNS = {
    "grpo with dynamic sampling": [
        "rl.dynamic_sampling.enabled=true", "rl.dynamic_sampling.keep_surplus=true", "rl.dynamic_sampling.max_rounds=4",
    ],
    "ppo": ["rl.algorithm=ppo", "rl.critic.optim.lr=1e-3"],
}  # fmt: skip
NOT_COMPARED = ("timing_s/", "perf/", "tool/duration", "tool/wait", "grading/")
"""Metrics that are clock time, or tell what a process had to judge because it had not seen it before."""
LEFT_S = 20.0
"""Seconds after which a process that outlives its run counts as an orphan."""


def descendants(pid: int) -> set[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, open_pids = set(), [pid]
    while open_pids:
        for child in parents.get(open_pids.pop(), []):
            found.add(child)
            open_pids.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2][1] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if lives(pid)}


def start(out: Path, name: str, base: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "retool.cli", "rl", str(RECIPE), "--quiet", f"run.out={out}", f"run.name={name}",
        f"model.path={base}", *COMMON, *settings,
    ]  # fmt: skip
    return subprocess.Popen(command, start_new_session=True)


def kill_somewhere(process: subprocess.Popen[bytes], folder: Path, rng: random.Random, seconds: float) -> str | None:
    """Kill the run at a random instant of the ``seconds`` that it takes, or at the next checkpoint's writing; returns
    where it was, or None where the run had ended by itself."""
    in_checkpoint = rng.random() < 1 / 3
    until = time.monotonic() + (120 if in_checkpoint else rng.uniform(0.0, seconds))
    where = "at a random instant"
    while time.monotonic() < until:
        if process.poll() is not None:
            return None
        if in_checkpoint and any((folder / "checkpoints").glob(".step_*.aside")):
            time.sleep(rng.uniform(0, 0.02))
            where = "while a checkpoint was written"
            break
        time.sleep(0.001)
    children = descendants(process.pid)
    if len(children) > 4 and not in_checkpoint:
        where += ", with its sandbox at work"
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + LEFT_S
    while alive(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left := alive(children):
        raise SystemExit(f"processes left behind: {sorted(left)}")
    return where


def check_whole(folder: Path) -> None:
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if not (checkpoint / CHECKSUMS).exists() or (fault := fault_of(checkpoint)):
            raise SystemExit(f"{checkpoint}: half a checkpoint ({fault if fault else 'no checksums'})")


def timeless(folder: Path) -> list[dict[str, str]]:
    """Values as JSON, so that NaN equals NaN."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: json.dumps(v) for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    a, b = timeless(one), timeless(other)
    if len(a) != len(b):
        return [f"{len(a)} and {len(b)} steps"]
    return sorted({k for x, y in zip(a, b, strict=True) for k in x.keys() | y.keys() if x.get(k) != y.get(k)})


def equal_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each of the two runs together, half of them each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        cold = ["sft.steps=60", f"run.out={out}", "run.name=base", "run.threads=1"]
        base = Path(sft.run(load_recipe(RECIPE, cold), progress=Progress())["checkpoint"])
        for number, (title, settings) in enumerate(RUNS.items()):
            whole, cut = out / f"whole{number}", out / f"cut{number}"
            began = time.monotonic()
            if start(out, whole.name, base, settings).wait():
                raise SystemExit(f"{title}: the undisturbed run failed")
            seconds = time.monotonic() - began
            kills, starts, places = args.kills // len(RUNS), 0, []
            while True:
                process = start(out, cut.name, base, settings)
                starts += 1
                where = kill_somewhere(process, cut, rng, seconds) if len(places) < kills else None
                if where is None:
                    if code := process.wait():
                        raise SystemExit(f"{title}: the run ended with exit code {code}")
                    if len(places) >= kills:
                        break
                    # It was done before its time: take it up from an early checkpoint, as after a longer outage.
                    for checkpoint in sorted((cut / "checkpoints").glob("step_*"))[1:]:
                        subprocess.run(["rm", "-r", str(checkpoint)], check=True)
                    continue
                places.append(where)
                check_whole(cut)
            counted = {place: places.count(place) for place in sorted(set(places))}
            differing = differences(whole, cut)
            ends = [RunFolder.open(folder).latest_checkpoint() or folder for folder in (whole, cut)]
            same_weights = equal_weights(*ends)
            print(f"{title}: {len(places)} kills ({counted}), {starts} starts, undisturbed {seconds:.0f} s")
            print(f"  metrics equal: {not differing}; weights equal bit by bit: {same_weights}", flush=True)
            if differing or not same_weights:
                print(f"  differing: {', '.join(differing)}")
                raise SystemExit(1)


if __name__ == "__main__":
    main()
