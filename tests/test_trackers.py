"""Trackers: what is logged can be read back, and none of them can end a run."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retool.config import Recipe, make_recipe
from retool.errors import ConfigError
from retool.protocols import Tracker
from retool.store import RunFolder
from retool.trackers import RUN_ID, TensorBoard, Trackers, WeightsAndBiases, check_trackers, open_trackers


class Kept:
    """A tracker that keeps what it gets, and fails where it is told to."""

    def __init__(self, *, fails_at: int = 0, close_fails: bool = False) -> None:
        self.fails_at, self.close_fails = fails_at, close_fails
        self.steps: list[int] = []
        self.closed = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.fails_at:
            raise RuntimeError("the service\nis gone")
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1
        if self.close_fails:
            raise ValueError("it does not close")


def recipe_for(*trackers: str) -> Recipe:
    return make_recipe({"run": {"name": "r7", "project": "p", "trackers": list(trackers)}})


def never(line: str) -> None:
    raise AssertionError(line)


# several at once


def test_each_tracker_gets_every_step_and_is_closed_once() -> None:
    first, second = Kept(), Kept()
    trackers: Tracker = Trackers([("a", first), ("b", second)], never)
    trackers.log(1, {"x": 1.0})
    trackers.log(2, {"x": 2.0})
    trackers.close()
    trackers.close()
    trackers.log(3, {"x": 3.0})
    assert (first.steps, first.closed) == (second.steps, second.closed) == ([1, 2], 1)


@pytest.mark.parametrize("close_fails", [False, True])
def test_one_that_fails_is_left_out_and_complained_of_once(close_fails: bool) -> None:
    first, bad, last = Kept(), Kept(fails_at=2, close_fails=close_fails), Kept()
    lines: list[str] = []
    trackers = Trackers([("a", first), ("wandb", bad), ("c", last)], lines.append)
    for step in (1, 2, 3):
        trackers.log(step, {"x": 1.0})
    trackers.close()
    assert lines == ["tracker wandb failed and is left out from now on: RuntimeError: the service is gone"]
    assert (bad.steps, bad.closed) == ([1], 1)
    assert (first.steps, first.closed) == (last.steps, last.closed) == ([1, 2, 3], 1)


def test_one_that_does_not_close_keeps_no_other_from_it() -> None:
    lines: list[str] = []
    last = Kept()
    Trackers([("a", Kept(close_fails=True)), ("b", last)], lines.append).close()
    assert lines == ["tracker a could not be closed: ValueError: it does not close"]
    assert last.closed == 1


def test_ctrl_c_is_not_a_failure_of_a_tracker() -> None:
    class Interrupted(Kept):
        def log(self, step: int, metrics: dict[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([("a", Interrupted())], never).log(1, {})


# opening


def test_metrics_are_always_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    trackers = open_trackers(folder, recipe_for(), never, job="rl")
    trackers.log(1, {"x": 0.5})
    trackers.close()
    assert folder.metrics() == [{"step": 1.0, "x": 0.5}]
    assert not (folder.path / "tensorboard").exists() and not (folder.path / "wandb").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError) as raised:
        open_trackers(folder, recipe_for(name), never, job="rl")
    said = f"run.trackers holds {name!r}: the package is not installed; pip install {name}"
    assert str(raised.value) == said
    assert not folder.metrics_path.exists()


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb writes into a folder called wandb, and Python takes any folder on its path for a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(recipe_for("wandb"))


class FakeWandb(types.ModuleType):
    """The part of wandb that we use; ``fault`` is what ``init`` raises."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")  # type: ignore[assignment]
        self.fault = fault
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.disabled = False
        self.finished = 0

    def init(self, **settings: Any) -> FakeWandb:
        if self.fault:
            raise self.fault
        self.inits.append(settings)
        self.id = settings["id"] or "fresh1"
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


def test_one_that_cannot_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no network\n  at all")))
    folder = RunFolder(tmp_path / "run")
    lines: list[str] = []
    trackers = open_trackers(folder, recipe_for("wandb"), lines.append, job="rl")
    trackers.log(1, {"x": 0.5})
    trackers.close()
    assert lines == ["tracker wandb could not start and is left out: RuntimeError: no network at all"]
    assert len(folder.metrics()) == 1
    assert not (folder.path / RUN_ID).exists()


def test_the_same_tracker_twice_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = open_trackers(RunFolder(tmp_path / "run"), recipe_for("wandb", "wandb"), never, job="rl")
    trackers.log(4, {"x": 0.5, "y": math.nan, "z": -math.inf})
    trackers.close()
    assert len(wandb.inits) == wandb.finished == 1
    assert wandb.logged == [({"x": 0.5}, 4)]


def test_wandb_is_told_the_recipe_without_its_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = recipe_for("wandb")
    recipe.sandbox.token = "s3cret"
    WeightsAndBiases(tmp_path, recipe, job="sft").close()
    told = wandb.inits[0]
    assert (told["project"], told["name"], told["job_type"], told["dir"]) == ("p", "r7", "sft", str(tmp_path))
    assert told["config"]["rl"]["steps"] == recipe.rl.steps
    assert "token" not in told["config"]["sandbox"] and "s3cret" not in repr(told)


@pytest.mark.parametrize(
    ("argument", "hidden"), [("sandbox.token=s3cret", True), (" sandbox.token =x", True), ("sandbox.url=x", False)]
)
def test_wandb_is_told_of_the_machine_unless_the_command_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, hidden: bool
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "argv", ["retool", "rl", "quickstart", argument])
    WeightsAndBiases(tmp_path, recipe_for("wandb"), job="rl").close()
    assert wandb.inits[0]["settings"]["x_disable_meta"] is hidden


def test_a_disabled_wandb_leaves_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    wandb.disabled = True
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    WeightsAndBiases(tmp_path, recipe_for("wandb"), job="rl").close()
    assert not (tmp_path / RUN_ID).exists()


# the real TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_shows_each_step_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path / "tb")
    board.log(1, {"train/loss": 0.5, "acc/mean": math.nan})
    assert scalars(tmp_path / "tb") == {"train/loss": [(1, 0.5)]}
    board.log(2, {"train/loss": 0.25, "acc/mean": 0.75, "x": math.inf})
    board.close()
    assert scalars(tmp_path / "tb") == {"train/loss": [(1, 0.5), (2, 0.25)], "acc/mean": [(2, 0.75)]}


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path / "run")
    for done, value in ((0, 1.0), (2, 2.0)):
        trackers = open_trackers(folder, recipe_for("tensorboard"), never, job="rl", done=done)
        for step in range(done + 1, 5 - done // 2):
            trackers.log(step, {"x": value})
        trackers.close()
    assert scalars(folder.path / "tensorboard") == {"x": [(1, 1.0), (2, 1.0), (3, 2.0)]}


def test_tensorboard_that_cannot_write_is_complained_of(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path / "run")
    (folder.path / "tensorboard").write_text("in the way")
    lines: list[str] = []
    trackers = open_trackers(folder, recipe_for("tensorboard"), lines.append, job="rl")
    trackers.log(1, {"x": 1.0})
    trackers.close()
    assert len(lines) == 1 and lines[0].startswith("tracker tensorboard could not start and is left out: ")
    assert len(folder.metrics()) == 1


# the real wandb, which writes to the disk and needs no network


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # wandb reads its variables once in a process
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, offline: None) -> None:
    folder = RunFolder(tmp_path / "run")
    for done in (0, 2):
        trackers = open_trackers(folder, recipe_for("wandb", "tensorboard"), never, job="rl", done=done)
        trackers.log(done + 1, {"train/loss": 0.5, "acc/mean": math.nan})
        trackers.log(done + 2, {"train/loss": 0.25})
        trackers.close()
    known = (folder.path / RUN_ID).read_text().strip()
    assert known
    files = list((folder.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2
    assert all(b"train/loss" in file.read_bytes() for file in files)
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4]


def test_wandb_without_a_login_is_complained_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    lines: list[str] = []
    folder = RunFolder(tmp_path / "run")
    trackers = open_trackers(folder, recipe_for("wandb"), lines.append, job="rl")
    trackers.log(1, {"x": 1.0})
    trackers.close()
    assert len(lines) == 1 and lines[0].startswith("tracker wandb could not start and is left out: UsageError: ")
    assert len(folder.metrics()) == 1
