"""The run folder: what is written comes back, and a crash at any instant leaves the last good state."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from synthetic import ERROR, OK, attempts, code_turn, make_group, make_task, make_trajectory, malformed_turn

from retool.config import make_recipe
from retool.errors import DataError, UserError
from retool.store import (
    JsonlTracker,
    RunFolder,
    git_commit,
    read_groups,
    read_metrics,
    read_trajectories,
    write_directory,
    write_trajectories,
)
from retool.types import ExecutionResult, StopReason, TrajectoryGroup


def _groups() -> list[TrajectoryGroup]:
    task = make_task(3, "6", "mul", "Zwölf − drei? <b>")
    nasty = "print('</script>\\ud800')"
    turns = [
        code_turn("Rechne:", nasty, ExecutionResult(OK, "é\n" * 3, "warn", 0, 0.25, truncated=True)),
        malformed_turn("Noch einmal:", "{"),
        code_turn("So:", "1/0", ExecutionResult(ERROR, "", "ZeroDivisionError", -9, 0.5)),
    ]
    learnt = make_trajectory(task, 0, "6", turns)
    learnt.advantage, learnt.sandbox_s = 0.75, 1.5
    ungraded = make_trajectory(task, 1, None, [], StopReason.CONTEXT_FULL)
    ungraded.grade = None
    return [TrajectoryGroup(task, [learnt, ungraded]), make_group(make_task(4), ["72", None], infra=1)]


def test_trajectories_come_back_whole(tmp_path: Path) -> None:
    groups = _groups()
    write_trajectories(tmp_path / "t.parquet", groups)
    back = read_groups(tmp_path / "t.parquet")
    assert [len(g.trajectories) for g in back] == [2, 2] and [len(g.infra_failed) for g in back] == [0, 1]
    for old, new in zip(
        [t for g in groups for t in g.trajectories], [t for g in back for t in g.trajectories], strict=True
    ):
        assert new.ids_T == old.ids_T and new.mask_T == old.mask_T
        assert new.logprobs_T == pytest.approx(old.logprobs_T)
        assert [t.observation_ids for t in new.turns] == [t.observation_ids for t in old.turns]
        assert [(t.text, t.calls, t.executions) for t in new.turns] == [
            (t.text, t.calls, t.executions) for t in old.turns
        ]
        assert (new.task, new.sample, new.stop_reason) == (old.task, old.sample, old.stop_reason)
        assert (new.reward, new.grade, new.advantage, new.sandbox_s) == (
            old.reward,
            old.grade,
            old.advantage,
            old.sandbox_s,
        )
    lost = read_trajectories(tmp_path / "t.parquet")[-1]
    assert lost.stop_reason is StopReason.INFRA and lost.turns == []


def test_a_data_frame_finds_the_columns_that_the_design_promises(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "t.parquet", _groups())
    row = pq.read_table(tmp_path / "t.parquet").to_pylist()[0]
    assert len(row["ids"]) == len(row["mask"]) == len(row["logprobs"])
    assert row["task_id"] == "world/test/3" and row["correct"] is True and row["prediction"] == "6"
    assert "Rechne:" in row["text"] and "ZeroDivisionError" in row["text"]
    assert all(p == 0.0 for p, m in zip(row["logprobs"], row["mask"], strict=True) if not m)


def test_text_that_is_no_unicode_is_kept_readable(tmp_path: Path) -> None:
    turn = code_turn("Look:", "print('\ud800')", ExecutionResult(OK, "a\udcffb\x00", "", 0))
    group = TrajectoryGroup(make_task(), [make_trajectory(make_task(), 0, "1", [turn])])
    write_trajectories(tmp_path / "t.parquet", [group])
    result = read_trajectories(tmp_path / "t.parquet")[0].turns[0].executions[0]
    assert result is not None and result.stdout == "a?b\x00"


def test_the_same_task_twice_in_a_step_stays_two_groups(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "t.parquet", [make_group(make_task(), ["72"]), make_group(make_task(), ["0"])])
    assert len(read_groups(tmp_path / "t.parquet")) == 2


def test_no_trajectories_is_a_file_of_none(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "t.parquet", [])
    assert read_groups(tmp_path / "t.parquet") == []


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no parquet at all"])
def test_an_unreadable_trajectory_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.parquet: no readable trajectory file") as caught:
        read_groups(tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)


def test_a_foreign_parquet_file_is_one_line(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no readable trajectory file"):
        read_groups(tmp_path / "t.parquet")


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_metrics_come_back_and_nan_is_valid_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"a": 0.5, "b": math.nan})
    tracker.log(2, {"a": math.inf})
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
        {"step": 1, "a": 0.5, "b": None},
        {"step": 2, "a": None},
    ], "each line must be there as soon as it is logged"
    tracker.close()
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert first["a"] == 0.5 and math.isnan(first["b"]) and second["step"] == 2


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_torn_anywhere_costs_that_line_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 2.0})
    tracker.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(path)] == [1]
    again = JsonlTracker(path)
    again.log(2, {"a": 3.0})
    again.close()
    assert [row["a"] for row in read_metrics(path)] == [1.0, 3.0]


def test_a_tracker_that_cannot_write_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.close()
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 1.0})
    assert [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()][1:] == []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("line", ["{", "[1]", '{"a": 1}', '{"step": 1, "a": "x"}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path / "m.jsonl")


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_config_is_the_recipe_with_every_default(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"run": {"name": 'a "quoted"\nname'}, "model": {"tokenizer": "t", "random_init": {"layers": 2}}}
    )
    run = RunFolder(tmp_path / "run")
    run.write_config(recipe)
    tree = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert make_recipe(tree) == recipe
    assert tree["rl"]["clip_high"] == 0.28 and run.config() == tree


def test_the_token_of_a_sandbox_service_stays_out_of_the_run_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from retool.config import load_recipe; from retool.store import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1])); run.write_config(load_recipe(sys.argv[2], sys.argv[3:]))\n"
        "run.write_environment(seed=0, device='cpu')"
    )
    (tmp_path / "r.toml").write_text("")
    arguments = [str(tmp_path / "run"), str(tmp_path / "r.toml"), "sandbox.token = s3cret", "sandbox.url=http://h"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    written = {path.name: path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(written) == {"config.toml", "environment.json"}
    assert not any("s3cret" in text for text in written.values())
    assert RunFolder(tmp_path / "run").environment()["command"][-2:] == ["sandbox.token =…", "sandbox.url=http://h"]


def test_the_environment_names_versions_and_seed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_environment(seed=7, device="cpu", model="nano")
    environment = run.environment()
    assert environment["seed"] == 7 and environment["model"] == "nano" and environment["versions"]["numpy"]
    assert "verl" not in environment["versions"] or environment["versions"]["verl"]


def test_an_untracked_file_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path / "x.py") is None


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="is no run"):
        RunFolder(tmp_path)
    with pytest.raises(UserError, match="there is no run"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match="a file of that name"):
        RunFolder(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="there is no run"):
        RunFolder.open(tmp_path / "missing")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_taken_up_again(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.write_summary({"accuracy": 0.5, "ci95": [0.4, math.nan]})
    assert RunFolder(tmp_path / "run").summary() == {"accuracy": 0.5, "ci95": [0.4, None]}
    assert RunFolder.open(tmp_path / "run").metrics() == []


def test_files_of_steps_and_evaluations_are_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    groups = attempts(0, 2, 2, 0.5, 0.5)
    run.write_step(12, groups)
    run.write_step(2, groups)
    assert run.write_eval("grpo", groups).name == "eval_grpo.parquet"
    assert run.step_trajectories(12).name == "step_000012.parquet"
    assert run.trajectory_steps() == [2, 12] and run.eval_labels() == ["grpo"]
    with pytest.raises(ValueError, match="label"):
        run.eval_trajectories("../x")


def test_a_checkpoint_that_failed_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.latest_checkpoint() is None
    with write_directory(run.checkpoint_path(5)) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "w").write_text("five")
        assert run.latest_checkpoint() is None, "a checkpoint must not be found before it is whole"
    with pytest.raises(KeyboardInterrupt), write_directory(run.checkpoint_path(10)) as folder:
        (folder / "w").write_text("half")
        raise KeyboardInterrupt
    assert run.checkpoint_steps() == [5]
    with write_directory(run.checkpoint_path(5)) as folder:
        (folder / "w").write_text("again")
    assert [p.name for p in run.checkpoint_path(5).iterdir()] == ["w"]
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000005"]


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with write_directory(run.checkpoint_path(5)) as folder:
        (folder / "w").write_text("good")
    run.checkpoint_path(5).rename(run.path / "checkpoints" / ".step_000005.old")
    (run.path / "checkpoints" / ".step_000005.aside").mkdir()
    assert RunFolder(run.path).latest_checkpoint() == run.checkpoint_path(5)
    assert (run.checkpoint_path(5) / "w").read_text() == "good"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000005"]


def test_rewinding_forgets_later_steps_and_keeps_the_others_byte_for_byte(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    tracker = run.tracker()
    for step in (1, 2, 3):
        tracker.log(step, {"n": step, "x": 0.1 * step})
        run.write_step(step, attempts(step, 1, 1, 0.5, 0.5))
    tracker.close()
    before = run.metrics_path.read_bytes()
    run.rewind(2)
    assert before.startswith(run.metrics_path.read_bytes()) and run.metrics_path.read_bytes().count(b"\n") == 2
    assert run.trajectory_steps() == [1, 2]
    run.rewind(0)
    assert run.metrics() == []


@pytest.mark.parametrize("name,content", [("summary.json", "{"), ("summary.json", "[1]"), ("config.toml", "= 1")])
def test_a_broken_file_of_the_run_is_named(tmp_path: Path, name: str, content: str) -> None:
    run = RunFolder(tmp_path / "run")
    (run.path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        run.summary() if name == "summary.json" else run.config()
