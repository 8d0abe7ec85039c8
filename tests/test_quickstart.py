"""The whole job in miniature, as ``retool quickstart`` runs it: what it leaves, and that Ctrl-C leaves no process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool import evaluate, quickstart
from retool.config import SHIPPED_RECIPES, Recipe, load_recipe
from retool.errors import UserError
from retool.progress import Progress
from retool.store import RunFolder, read_trajectories
from tests.fakes import hear_ctrl_c

SMALL = [
    "run.threads=1", "data.test_size=8", "sft.steps=2", "sft.batch_size=4", "rl.steps=2", "rl.prompts=2",
    "rl.group_size=2", "rl.minibatch_prompts=1", "sandbox.workers=2", "eval.bootstrap=100",
    "rollout.max_response_tokens=48",
]  # fmt: skip


def small_recipe(out: Path, *more: str) -> Recipe:
    return load_recipe(SHIPPED_RECIPES / "quickstart.toml", [*SMALL, f"run.out={out}", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    quickstart.run(small_recipe(out), from_scratch=False, with_control=True, progress=Progress(file=printed))
    return out / "quickstart", printed.getvalue()


def test_summary_holds_every_stage(finished: tuple[Path, str]) -> None:
    path, _ = finished
    summary = json.loads((path / "summary.json").read_text())
    for stage in ("base", "sft", "grpo", "text_only"):
        found = summary[stage]
        assert found["samples"] == 8
        low, high = found["ci95"]
        assert 0 <= low <= found["accuracy"] <= high <= 1
        assert found["num_turns"] >= 2
        assert 0 <= found["call_rate"] <= 1
    assert summary["text_only"]["call_rate"] == 0
    assert summary["seed"] == 0
    assert summary["wall_seconds"] > 0


def test_report_and_trajectories_are_there(finished: tuple[Path, str]) -> None:
    path, printed = finished
    page = (path / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for stage in ("base", "sft", "grpo", "text_only"):
        assert len(read_trajectories(path / "trajectories" / f"eval_{stage}.parquet")) == 8
    for part in ("sft", "grpo", "text_only"):
        assert len(RunFolder.open(path / part).metrics()) == 2
    for word in ("after GRPO", "text-only RL", "95 % interval", str(path / "report.html")):
        assert word in printed


def test_the_papers_tags_serve_as_well(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, "rollout.format=code_tags")
    quickstart.run(recipe, from_scratch=False, with_control=False, progress=Progress(quiet=True))
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["grpo"]["samples"] == 8
    assert "<svg" in (tmp_path / "quickstart" / "report.html").read_text()


def test_the_same_seed_gives_the_same_trajectories(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Greedy or not: the first evaluation depends on the seed alone."""
    path, _ = finished
    recipe = small_recipe(tmp_path, "run.name=again")
    evaluate.run(recipe, progress=Progress(quiet=True))
    texts = [
        [turn.text for t in read_trajectories(file) for turn in t.turns]
        for file in (
            path / "trajectories" / "eval_base.parquet",
            tmp_path / "again" / "trajectories" / "eval_model.parquet",
        )
    ]
    assert texts[0] == texts[1]


def test_a_folder_that_is_no_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="there is no run"):
        quickstart.run(small_recipe(tmp_path), from_scratch=False, with_control=False, progress=Progress(quiet=True))
    assert (tmp_path / "quickstart" / "thesis.tex").read_text() == "years of work"


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(status.parent.name)
            found += [child, *children_of(child)]
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything_and_keeps_the_last_checkpoint(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "retool.cli", "quickstart", *SMALL, "rl.steps=10000", "rl.save_every=1"]
    process = subprocess.Popen(
        [*command, f"run.out={tmp_path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    checkpoints = tmp_path / "quickstart" / "grpo" / "checkpoints"
    try:
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("step_*")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = children_of(process.pid)
        assert children, "the sandbox should be running"
        os.kill(process.pid, sent)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # a test that fails must not leave a training run behind
    assert process.returncode == code, errors
    assert b"Traceback" not in errors
    gone = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    last = RunFolder(checkpoints.parent).latest_checkpoint()
    assert last is not None
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.pt"} <= {
        f.name for f in last.iterdir()
    }
