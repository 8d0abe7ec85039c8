"""Runs that survive: broken and missing checkpoints, a full disk, kills, alarms that end a run, adapters."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retool import rl, sft
from retool.cli import main
from retool.config import Recipe
from retool.engine import checkpoint as checkpoint_module
from retool.engine.runtime import load_runtime, open_sandbox
from retool.errors import HealthError, InfraError, UserError
from retool.progress import Progress
from retool.rollout import run_groups
from retool.store import RunFolder
from retool.store.best import Best
from retool.store.checkpoints import fault_of
from retool.store.resume import RunLock
from retool.types import ExecutionResult, ExecutionStatus, StopReason, TrajectoryGroup
from tests.test_rl import QUIET, samples_of, small_recipe, weights

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Heard(Progress):
    """Keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of SFT with a checkpoint after each, all of them kept."""
    out = tmp_path_factory.mktemp("runs")
    sft.run(recipe_of(out), progress=QUIET)
    return out


def recipe_of(out: Path, **run: Any) -> Recipe:
    return small_recipe(out, "x", run={"keep_checkpoints": 0} | run, sft={"steps": 4, "save_every": 1})


def test_a_checkpoint_with_a_flipped_byte_is_named_and_the_one_before_is_used(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished / "x"), str(tmp_path / "x")], check=True)
    folder, whole = RunFolder.open(tmp_path / "x"), weights(finished / "x/checkpoints/step_000004")
    flip_a_byte(folder.checkpoint_path(4) / "model.safetensors")
    flip_a_byte(folder.checkpoint_path(3) / "trainer_state.pt")
    heard = Heard()
    summary = sft.run(recipe_of(tmp_path), progress=heard)
    assert [line for line in heard.lines if "step_000004: model.safetensors has other bytes" in line]
    assert [line for line in heard.lines if "step_000003: trainer_state.pt has other bytes" in line]
    assert torch.equal(weights(Path(summary["checkpoint"])), whole), "it went on from step 2 to the same end"
    assert folder.checkpoint_steps() == [1, 2, 3, 4]
    assert all(fault_of(folder.checkpoint_path(step)) is None for step in folder.checkpoint_steps())
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4]


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished / "x"), str(tmp_path / "x")], check=True)
    folder = RunFolder.open(tmp_path / "x")
    for step in folder.checkpoint_steps():
        flip_a_byte(folder.checkpoint_path(step) / "config.json")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        sft.run(recipe_of(tmp_path), progress=QUIET)
    assert folder.checkpoint_steps() == [1, 2, 3, 4]
    assert len(folder.metrics()) == 4


def test_a_summary_that_a_kill_prevented_is_written_when_the_command_is_typed_again(
    finished: Path, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", str(finished / "x"), str(tmp_path / "x")], check=True)
    (tmp_path / "x/summary.json").unlink()
    assert sft.run(recipe_of(tmp_path), progress=QUIET)["checkpoint"].endswith("step_000004")
    assert RunFolder.open(tmp_path / "x").summary()["steps"] == 4


def test_two_processes_do_not_work_in_one_folder(finished: Path) -> None:
    recipe = recipe_of(finished)
    with RunLock(recipe), pytest.raises(UserError, match="another process is at work"):
        sft.run(recipe, progress=QUIET)
    assert sft.run(recipe, progress=QUIET)["steps"] == 4


def test_more_steps_are_the_same_run_only_where_nothing_depended_on_their_number(tmp_path: Path) -> None:
    rl_run = {"steps": 2, "eval_every": 0}
    rl.run(small_recipe(tmp_path, "x", rl=rl_run), progress=QUIET)
    assert rl.run(small_recipe(tmp_path, "x", rl=rl_run | {"steps": 3}), progress=QUIET)["steps"] == 3
    fixed = rl_run | {"optim": {"schedule": "linear", "lr": 1e-4}}
    rl.run(small_recipe(tmp_path, "y", rl=fixed), progress=QUIET)
    with pytest.raises(UserError, match=r"other settings \(rl.steps\)"):
        rl.run(small_recipe(tmp_path, "y", rl=fixed | {"steps": 3}), progress=QUIET)


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    best = Best("val-core/")
    best.resume({"step": 7, "metric": "val-core/s", "value": 0.9}, folder)
    assert (best.found, folder.best()) == (None, None)


def test_a_missing_file_is_a_fault(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished / "x"), str(tmp_path / "x")], check=True)
    folder = RunFolder.open(tmp_path / "x")
    (folder.checkpoint_path(4) / "config.json").unlink()
    heard: list[str] = []
    assert folder.sound_checkpoint(heard.append) == folder.checkpoint_path(3)
    assert "config.json is missing" in heard[0]


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """The second checkpoint does not fit; the same command goes on when there is room again."""
    count = 0

    def full(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if writer == "torch":
            patch.setattr(checkpoint_module.torch, "save", full(torch.save))
        else:
            patch.setattr(checkpoint_module, "save_model", full(checkpoint_module.save_model))
        with pytest.raises(InfraError, match="no space is left on the disk") as caught:
            sft.run(recipe_of(tmp_path), progress=QUIET)
    assert "\n" not in str(caught.value)
    assert "step_000002" in str(caught.value)
    folder = RunFolder.open(tmp_path / "x")
    assert folder.checkpoint_steps() == [1]
    assert fault_of(folder.checkpoint_path(1)) is None
    assert [entry.name for entry in (tmp_path / "x/checkpoints").iterdir() if entry.name.startswith(".")] == []
    assert sft.run(recipe_of(tmp_path), progress=QUIET)["steps"] == 4


def test_a_full_disk_is_one_line_wherever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "config.toml")

    monkeypatch.setattr("retool.store.folder.write_file", full)
    (tmp_path / "r.toml").write_text("", encoding="utf-8")
    arguments = ["sft", str(tmp_path / "r.toml"), f"run.out={tmp_path}", "sft.steps=1", "model.device=cpu"]
    assert main(arguments) == 1
    said = "config.toml could not be written (No space left on device); mend this and try again"
    assert capsys.readouterr().err == f"retool: error: {said}\n"


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of 20 MB, filled but for a part of a checkpoint."""
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no right to mount a small file system")
    try:
        recipe = recipe_of(tmp_path, keep_checkpoints=0)
        with pytest.raises(InfraError) as caught:
            sft.run(recipe, progress=QUIET)
        assert "\n" not in str(caught.value)
        steps = RunFolder.open(tmp_path / "x").checkpoint_steps()
        assert steps
        assert all(fault_of(RunFolder.open(tmp_path / "x").checkpoint_path(step)) is None for step in steps)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    best = Best("val-core/")
    for step, value in enumerate([0.2, 0.7, 0.5, 0.6, float("nan")], start=1):
        folder.checkpoint_path(step).mkdir()
        if best.update(step, {"acc/mean": 1.0, "val-core/s/acc/mean@1": value}):
            best.publish(folder)
        folder.prune_checkpoints(2)
    assert folder.checkpoint_steps() == [2, 4, 5]
    assert folder.best() == {"step": 2, "metric": "val-core/s/acc/mean@1", "value": 0.7}
    assert not Best("val/loss", higher=False, found={"value": 0.1}).update(1, {"val/loss": 0.2})
    folder.prune_checkpoints(0)
    assert folder.checkpoint_steps() == [2, 4, 5]


def test_a_run_keeps_two_checkpoints_by_default(tmp_path: Path) -> None:
    sft.run(small_recipe(tmp_path, "x", sft={"steps": 5, "save_every": 1}), progress=QUIET)
    folder = RunFolder.open(tmp_path / "x")
    best = folder.best()
    assert best is not None
    assert set(folder.checkpoint_steps()) == {4, 5, best["step"]}


# --- health ----------------------------------------------------------------------------------------------------------


def test_an_alarm_of_stop_on_ends_the_run_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base model's groups are all wrong: the share of groups without variance is 1."""
    settings = {"rl": {"steps": 4, "eval_every": 0}, "health": {"stop_on": ["zero_variance"]}}
    recipe = small_recipe(tmp_path, "x", **{k: v for k, v in settings.items() if k == "rl"})
    recipe = recipe.model_copy(update={"health": recipe.health.model_copy(update=settings["health"])})
    heard = Heard()
    with pytest.raises(HealthError, match="zero_variance at step 1"):
        rl.run(recipe, progress=heard)
    assert [line for line in heard.lines if line.startswith("! zero_variance at step 1")]
    rows = RunFolder.open(tmp_path / "x").metrics()
    assert [(row["step"], row["health/zero_variance"]) for row in rows] == [(1, 1.0)]
    assert RunFolder.open(tmp_path / "x").checkpoint_steps() == [1]
    load = lambda name: lambda recipe, progress: rl.run(recipe, progress=progress)  # noqa: E731
    (tmp_path / "r.toml").write_text((tmp_path / "x/config.toml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["rl", str(tmp_path / "r.toml"), "--quiet"], load=load) == 1
    error = capsys.readouterr().err
    assert "zero_variance" in error
    assert error.count("\n") == 1


def test_nothing_finite_to_learn_from_ends_the_run_with_the_weights_it_had(tmp_path: Path) -> None:
    """Rewards that make groups differ, and a learning rate's gradient that is NaN from the second step on."""
    recipe = small_recipe(tmp_path, "x", rl={"steps": 9, "eval_every": 0, "reward": "tests.test_survival:by_sample"})
    runtime = load_runtime(recipe)
    folder = RunFolder(tmp_path / "x")
    folder.write_config(recipe)
    calls = 0

    def poison(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal calls
        if module.training:
            calls += 1
            return output * float("nan") if calls > 1 else output
        return output

    runtime.model.model.norm.register_forward_hook(poison)

    async def job() -> None:
        async with open_sandbox(recipe) as sandbox:
            await rl.train(runtime, folder, sandbox, progress=QUIET)

    with pytest.raises(HealthError, match="not_finite"):
        asyncio.run(job())
    rows = folder.metrics()
    assert [row["actor/skipped"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert torch.equal(weights(folder.checkpoint_path(4)), weights(folder.checkpoint_path(3)))
    assert torch.isfinite(weights(folder.checkpoint_path(4))).all()


def by_sample(trajectory: Any) -> float:
    return float(trajectory.sample % 2)


# --- faults of the machine do not teach ------------------------------------------------------------------------------


class Flaky:
    """Every third execution fails by the sandbox's fault."""

    def __init__(self, sandbox: Any):
        self.sandbox, self.runs = sandbox, 0

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        self.runs += 1
        if self.runs % 3 == 0:
            return ExecutionResult(ExecutionStatus.INFRA)
        return await self.sandbox.execute(code, timeout_s, session=session)  # type: ignore[no-any-return]

    def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


def test_infra_faults_leave_the_other_trajectories_advantages_as_they_would_be_without_them(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, "x", sandbox={"retries": 0})
    runtime = load_runtime(recipe)

    async def roll() -> list[TrajectoryGroup]:
        from retool.data.sources import open_source

        async with open_sandbox(recipe) as sandbox:
            rollout = runtime.rollout(runtime.policy(), Flaky(sandbox))
            return await run_groups(rollout, open_source(recipe).train_tasks(0, 4), 6, seed=0, step=0)

    groups = asyncio.run(roll())
    lost = [t for g in groups for t in g.infra_failed]
    assert lost
    assert all(t.stop_reason is StopReason.INFRA for t in lost)
    for g in groups:
        for t in g.trajectories:
            t.reward = float(t.sample % 2)
    without = [TrajectoryGroup(g.task, list(g.trajectories)) for g in groups]
    for method in ("grpo", "dr_grpo", "rloo", "reinforce_pp"):
        assert samples_of(groups, advantage=method) == samples_of(without, advantage=method)
    assert all(t.advantage is None for t in lost)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_lora_learns_saves_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0, "save_merged": False}
    sections: dict[str, Any] = {"steps": 4, "batch_size": 8, "save_every": 2, "eval_every": 2, "optim": {"lr": 5e-3}}
    whole = sft.run(small_recipe(tmp_path, "whole", sft=sections, model={"lora": lora}), progress=QUIET)
    rows = RunFolder.open(tmp_path / "whole").metrics()
    assert rows[-1]["val/loss"] < rows[1]["val/loss"]
    recipe = small_recipe(tmp_path, "cut", sft=sections, model={"lora": lora})
    sft.run(recipe, progress=QUIET)
    folder = RunFolder.open(tmp_path / "cut")
    subprocess.run(["rm", "-r", str(folder.checkpoint_path(4))], check=True)
    assert not (folder.checkpoint_path(2) / "model.safetensors").exists()
    again = sft.run(recipe, progress=QUIET)
    assert torch.equal(weights(Path(again["checkpoint"])), weights(Path(whole["checkpoint"])))
    merged = AutoModelForCausalLM.from_pretrained(whole["checkpoint"])
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_lora_in_rl_with_a_reference(tmp_path: Path) -> None:
    """The reference is the base with the adapters off: at first there is no divergence."""
    recipe = small_recipe(
        tmp_path, "x", model={"lora": {"rank": 2}},
        rl={"steps": 2, "eval_every": 0, "reward": "tests.test_survival:by_sample", "kl": {"place": "loss"},
            "optim": {"lr": 1e-2}},
    )  # fmt: skip
    rl.run(recipe, progress=QUIET)
    rows = RunFolder.open(tmp_path / "x").metrics()
    assert rows[0]["actor/reference_kl"] == pytest.approx(0, abs=1e-6)
    assert abs(rows[1]["actor/reference_kl"]) > 1e-5


# --- the whole, from outside -----------------------------------------------------------------------------------------


def test_trackers_are_opened_and_a_missing_one_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    sft.run(small_recipe(tmp_path, "x", run={"trackers": ["tensorboard"]}), progress=QUIET)
    assert list((tmp_path / "x/tensorboard").glob("events.out.tfevents.*"))
    monkeypatch.setattr("retool.trackers.check_trackers", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        sft.run(small_recipe(tmp_path, "y", run={"trackers": ["wandb"]}), progress=QUIET)
    assert not (tmp_path / "y").exists()


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was() -> None:
    """A shortened benchmarks/kill_and_resume.py; docs/log.md has the 30 kills."""
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kill_and_resume.py"), "--kills", "4", "--seed", "1"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert found.stdout.count("metrics equal: True; weights equal bit by bit: True") == 2


def test_the_state_of_a_run_holds_only_plain_things(finished: Path) -> None:
    """A checkpoint runs nobody's code: it is loaded with ``weights_only``."""
    state = torch.load(finished / "x/checkpoints/step_000004/trainer_state.pt", weights_only=True)
    assert set(state) == {"learner", "best", "random"}
    sums = json.loads((finished / "x/checkpoints/step_000004/checksums.json").read_text(encoding="utf-8"))
    assert {"model.safetensors", "trainer_state.pt", "left_over.parquet", "config.json"} <= set(sums)
