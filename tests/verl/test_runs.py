"""The real verl on two CPU cores, started as a user starts it: SFT, GRPO, PPO and an evaluation of the nano model.

Each run is a child process under a hard time limit, and leaves no process behind. What stands in for a GPU is in
``plugin/`` and ``cpu.py``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer")

import cpu
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.config import ModelConfig
from retool.engine.model import load_model
from retool.metrics import definition, rollout_metrics
from retool.store import RunFolder, read_groups, read_metrics
from retool.types import ExecutionStatus

LIMIT_S = 240.0
"""Of one run; on an idle machine of two cores it takes about a minute, most of it imports."""
ACTORS = ("TaskRunnerV1", "Recorder", "WorkerDict", "CPUServer", "AgentLoopWorker", "NodePool", "SimpleStorage")
"""A run's, by the beginning of their names."""

REWARDS = '''
def by_calls(trajectory):
    """Something to learn from, whatever the model knows."""
    return 0.5 * trajectory.num_calls + (1.0 if trajectory.grade.correct else 0.0) + 0.001 * trajectory.sampled_length
'''

COMMON = ["cluster.gpus_per_node=2", "cluster.agent_workers=2", "model.device=cpu", "sandbox.preload=['math']"]
RL = [
    *COMMON,
    "rl.prompts=4", "rl.group_size=4", "rl.minibatch_prompts=2", "rl.eval_size=4", "rl.eval_every=1",
    "rl.save_every=1", "rl.reward=rewards:by_calls",
]  # fmt: skip


class Runs:
    """Starts ``retool`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        (folder / "rewards.py").write_text(REWARDS)

    def start(self, *arguments: str, options: tuple[str, ...]) -> subprocess.Popen[str]:
        environment = cpu.environment({"RETOOL_TEST_RUN": self.mark, "PYTHONPATH": f"{cpu.PLUGIN}:{self.folder}"})
        return subprocess.Popen(
            [sys.executable, "-m", "retool.cli", *arguments, "--engine", "verl", *cpu.arguments(options)],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and output, within the limit; afterwards nothing may be left of the run."""
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)
            raise
        assert self.left() == [], "processes were left behind"
        return process.returncode, output

    def run(self, *arguments: str, options: tuple[str, ...] = cpu.RL_OPTIONS) -> tuple[int, str]:
        return self.finish(self.start(*arguments, options=options))

    def left(self) -> list[int]:
        """Processes that carry the run's mark, which every descendant inherits."""
        mark, found = f"RETOOL_TEST_RUN={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def named(self, name: str) -> list[int]:
        """Those of them whose command line begins with ``name``."""
        found = []
        for pid in self.left():
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name.encode()):
                    found.append(pid)
            except OSError:
                continue
        return found


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What ``what`` returns once it is true, while the run goes on."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        assert process.poll() is None, f"the run ended: {process.stdout and process.stdout.read()}"
        time.sleep(0.1)
    raise AssertionError("the run did not come so far in time")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("verl"))
    yield runs
    for pid in runs.left():
        os.kill(pid, signal.SIGKILL)


def steps_of(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(folder / "metrics.jsonl")]


def loads(checkpoint: Path) -> None:
    """Any program loads it, and so does the local engine."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    load_model(ModelConfig(path=str(checkpoint), device="cpu"))


def test_sft(runs: Runs) -> None:
    """Four steps, a checkpoint, and a model that any program loads."""
    arguments = ["sft", "quickstart", *COMMON, "run.name=sft", "sft.batch_size=16", "sft.optim.name=adamw"]
    arguments += ["sft.optim.schedule=constant", "sft.optim.lr=1e-3", "sft.optim.warmup_steps=0"]
    code, output = runs.run(*arguments, "sft.steps=4", options=cpu.SFT_OPTIONS)
    assert code == 0, output
    folder = RunFolder.open(runs.folder / "runs" / "sft")
    losses = [row["train/loss"] for row in folder.metrics()]
    every_number_is_defined(folder.metrics())
    assert steps_of(folder.path) == [1, 2, 3, 4] and losses[-1] < losses[0]
    assert folder.summary()["engine"] == "verl" and folder.environment()["engine"] == "verl"
    assert folder.latest_checkpoint() == folder.checkpoint_path(4)
    loads(folder.checkpoint_path(4))


def test_grpo_survives(runs: Runs) -> None:
    """Two Ray workers, validation, a checkpoint each step. The sandbox is killed in the first step: it comes back, and
    nothing is mislabelled. A worker is killed after it: one line, and the same command goes on."""
    arguments = ["rl", "quickstart", *RL, "run.name=grpo", "rl.steps=3"]
    path = runs.folder / "runs" / "grpo"
    process = runs.start(*arguments, options=cpu.RL_OPTIONS)
    wait_for(lambda: (path / "metrics.jsonl").exists() and 0 in steps_of(path), process)
    os.kill(wait_for(lambda: runs.named("ray::NodePool"), process)[0], signal.SIGKILL)
    wait_for(lambda: 1 in steps_of(path), process)
    os.kill(wait_for(lambda: runs.named("ray::WorkerDict"), process)[0], signal.SIGKILL)
    code, output = runs.finish(process)
    assert code == 1 and output.count("retool: error:") == 1, output
    told = output.splitlines()[-1]
    assert re.search(r"verl ended with exit code \d+: .*(Died|Error)", told) and "the same command goes on" in told

    done = json.loads((path / "verl" / "latest_checkpointed_iteration.txt").read_text())
    assert done >= 1
    code, output = runs.run(*arguments)
    assert code == 0, output
    folder = RunFolder.open(path)
    assert steps_of(path) == [0, 1, 2, 3] and folder.trajectory_steps() == [1, 2, 3]
    assert folder.latest_checkpoint() == folder.checkpoint_path(3)
    loads(folder.checkpoint_path(3))
    every_number_is_defined(folder.metrics())
    sandbox_killed(folder)
    what_was_learnt_is_what_was_sampled(folder)


def every_number_is_defined(rows: list[dict[str, float]]) -> None:
    names = {name for row in rows for name in row} - {"step"}
    assert [name for name in sorted(names) if definition(name) is None] == []


def sandbox_killed(folder: RunFolder) -> None:
    assert folder.metrics()[1]["infra/sandbox_restarts"] >= 1
    for step in folder.trajectory_steps():
        for group in read_groups(folder.step_trajectories(step)):
            for t in group.trajectories:
                endings = [(e.status, e.exit_code) for turn in t.turns for e in turn.executions if e]
                assert ExecutionStatus.INFRA not in {status for status, _ in endings}
                assert (ExecutionStatus.KILLED, -signal.SIGKILL) not in endings
            for t in group.infra_failed:
                assert t.advantage is None


def what_was_learnt_is_what_was_sampled(folder: RunFolder) -> None:
    for row in folder.metrics()[1:]:
        step = int(row["step"])
        assert row["training/rollout_actor_probs_pearson_corr"] >= 0.999
        assert row["training/rollout_logprob_gap_max"] < 1e-3
        assert row["actor/grad_norm"] > 0 and row["val-aux/num_turns/mean"] >= 2
        assert "val-core/world/acc/mean@1" in row
        groups = read_groups(folder.step_trajectories(step))
        assert len(groups) == 4 and all(len(g.trajectories) + len(g.infra_failed) == 4 for g in groups)
        for name, value in rollout_metrics(groups).items():
            assert row[name] == pytest.approx(value), name
        for group in groups:
            rewards = torch.tensor([t.reward for t in group.trajectories], dtype=torch.float64)
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # GRPO, arXiv 2402.03300
            advantages = torch.tensor([t.advantage for t in group.trajectories], dtype=torch.float64)
            assert torch.allclose(advantages, expected, atol=1e-4)


def test_ppo_is_interrupted_and_goes_on(runs: Runs) -> None:
    """With a critic. Ctrl-C ends every process; the same command goes on from what was saved."""
    arguments = ["rl", "quickstart", *RL, "run.name=ppo", "rl.algorithm=ppo", "rl.group_size=2", "rl.steps=2"]
    arguments += ["rl.eval_every=0"]
    options = cpu.RL_OPTIONS + cpu.PPO_OPTIONS
    path = runs.folder / "runs" / "ppo"
    process = runs.start(*arguments, options=options)
    wait_for(lambda: (path / "metrics.jsonl").exists() and 1 in steps_of(path), process)
    process.send_signal(signal.SIGINT)
    code, output = runs.finish(process)
    assert code == 130 and output.splitlines()[-1] == "retool: interrupted", output
    code, output = runs.run(*arguments, options=options)
    assert code == 0, output
    folder = RunFolder.open(path)
    rows = folder.metrics()
    assert steps_of(path) == [1, 2] == folder.trajectory_steps()
    every_number_is_defined(rows)
    for row in rows:
        assert row["critic/grad_norm"] > 0 and row["actor/grad_norm"] > 0
        assert "critic/vf_explained_var" in row and row["training/rollout_actor_probs_pearson_corr"] >= 0.999
    loads(folder.checkpoint_path(2))


@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[tuple[str, Runs]]:
    """A Ray that runs already, as ``ray start`` leaves it: its address, and what finds its processes."""
    cluster = Runs(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--port={port}", "--num-cpus=16", "--num-gpus=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false",
         *arguments],
        env=cpu.environment({"RETOOL_TEST_RUN": cluster.mark}), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(lambda: cluster.named(raylet()), process)
        yield f"{ray.util.get_node_ip_address()}:{port}", cluster
    finally:
        process.terminate()
        process.wait(30)
        for pid in cluster.left():
            os.kill(pid, signal.SIGKILL)


def raylet() -> str:
    return str(Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet")


def test_an_evaluation_on_a_ray_that_runs_already(runs: Runs, ray_cluster: tuple[str, Runs]) -> None:
    """It is joined, and left as it was found."""
    address, cluster = ray_cluster
    options = tuple(option for option in cpu.RL_OPTIONS if "ray_kwargs" not in option)
    arguments = ["eval", "quickstart", *COMMON, "run.name=eval", "data.test_size=6", "eval.k=2"]
    code, output = runs.run(*arguments, f"cluster.address={address}", options=options)
    assert code == 0, output
    deadline = time.monotonic() + 20
    while workers := [pid for name in ACTORS for pid in cluster.named(f"ray::{name}")]:
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)
    assert cluster.named(raylet())
    folder = RunFolder.open(runs.folder / "runs" / "eval")
    summary = folder.summary()["eval"]
    assert summary["k"] == 2 and summary["samples"] == 12 and summary["problems"] == 6
    assert len(read_groups(folder.eval_trajectories("model"))) == 6
    assert "mean@2" in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rl", "quickstart", "model.path=no/such/model"], "model.path = 'no/such/model': "),
        (["rl", "quickstart", "cluster.address=127.0.0.1:9"], "cluster.address = '127.0.0.1:9': no Ray answers there"),
        (["rl", "quickstart", "--verl", "trainer.no_such=1"], "no_such"),
        (["rl", "quickstart", "--verl", "data.train_batch_size=7"], "give rl.prompts"),
        (["rl", "quickstart", "data.train=FILE", "data.columns={question='text', answer='answer'}"], "text"),
        (["sft", "quickstart", "sft.steps=2"], "sft.optim.name"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(runs: Runs, arguments: list[str], told: str) -> None:
    file = runs.folder / "problems.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    words = [word.replace("FILE", str(file)) for word in arguments]
    code, output = runs.run(*words, "run.name=mistake", options=())
    assert code == 2 and told in output, output
    assert len(output.strip().splitlines()) == 1 and not (runs.folder / "runs" / "mistake").exists()
