"""The recorder: a step's trajectories as they arrive become the run folder's file and the step's metrics."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from retool.cluster.recorder import Recorder, secret_tree
from retool.config import Recipe, make_recipe, recipe_toml
from retool.errors import InfraError, UserError
from retool.metrics import evaluation_summary, rollout_metrics, validation_metrics
from retool.store import RunFolder, read_groups
from retool.types import ExecutionResult, StopReason, Trajectory, TrajectoryGroup
from tests.synthetic import ERROR, OK, code_turn, make_task, make_trajectory

RIGHT, LEFT = make_task(0, "72"), make_task(1, "5")
RESTARTS = "infra/sandbox_restarts"
COUNTS = {"grading/hard": 1.0, "grading/timeouts": 0.0}


def recipe_of(**sections: Any) -> Recipe:
    return make_recipe({"eval": {"bootstrap": 100, "k": 2}, "run": {"seed": 4}, **sections})


def recorder_of(folder: Path, job: str = "rl", **sections: Any) -> tuple[Recorder, RunFolder]:
    recipe = recipe_of(**sections)
    run = RunFolder(folder)
    run.write_config(recipe)
    return Recorder(secret_tree(recipe), str(folder), job), run


def attempt(task: Any, sample: int, prediction: str | None) -> Trajectory:
    ran = code_turn("Run it.", "print(72)", ExecutionResult(OK if sample else ERROR, "72", "", 0, 0.01))
    return make_trajectory(task, sample, prediction, [ran] if sample != 1 else [])


def lost(task: Any, sample: int) -> Trajectory:
    return Trajectory(task, sample, [1, 2], [], StopReason.INFRA)


def a_step() -> list[TrajectoryGroup]:
    """Two tasks, of the second one trajectory lost."""
    first = TrajectoryGroup(RIGHT, [attempt(RIGHT, 0, "72"), attempt(RIGHT, 1, "71"), attempt(RIGHT, 2, None)])
    second = TrajectoryGroup(LEFT, [attempt(LEFT, 0, "5"), attempt(LEFT, 2, "5")], [lost(LEFT, 1)])
    return [first, second]


def send(
    recorder: Recorder, groups: list[TrajectoryGroup], *, validation: bool = False, counts: Any = COUNTS, uid: str = "g"
) -> None:
    """As workers do: the last first, groups mixed. The recorder gets copies, as it does through Ray."""
    flat = [(place, t) for place, g in enumerate(groups) for t in (*g.trajectories, *g.infra_failed)]
    for place, trajectory in sorted(flat, key=lambda item: (-item[1].sample, -item[0])):
        recorder.add(f"{uid}{place}", place, copy.deepcopy(trajectory), counts, validation=validation)


def end_step(recorder: Recorder, step: int, advantages: dict[str, float]) -> dict[str, float]:
    """With the file, which is written beside the next step; less what the nodes alone know."""
    metrics = recorder.end_step(step, advantages)
    recorder.flush()
    assert metrics.pop(RESTARTS) == 0.0
    return metrics


def test_a_step_is_written_and_counted(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    groups = a_step()
    send(recorder, groups)
    advantages = {"g0_0": 1.5, "g0_1": -0.5, "g1_2": 0.25}
    metrics = end_step(recorder, 3, advantages)
    assert metrics == rollout_metrics(groups) | {"grading/hard": 6.0, "grading/timeouts": 0.0}
    assert (metrics["infra/trajectories"], metrics["rollout/trajectories"]) == (1.0, 5.0)
    assert run.trajectory_steps() == [3]
    found = read_groups(run.step_trajectories(3))
    assert [group.task for group in found] == [RIGHT, LEFT]
    assert [[t.sample for t in group.trajectories] for group in found] == [[0, 1, 2], [0, 2]]
    assert [[t.advantage for t in group.trajectories] for group in found] == [[1.5, -0.5, None], [None, 0.25]]
    assert [(t.sample, t.stop_reason, t.advantage) for t in found[1].infra_failed] == [(1, StopReason.INFRA, None)]
    assert found[0].infra_failed == []
    for group, expected in zip(found, groups, strict=True):
        for t, e in zip(group.trajectories, expected.trajectories, strict=True):
            assert (t.ids_T, t.mask_T, t.stop_reason, t.reward, t.grade) == (
                e.ids_T, e.mask_T, e.stop_reason, e.reward, e.grade
            )  # fmt: skip
            assert t.logprobs_T == pytest.approx(e.logprobs_T)
            assert [turn.executions for turn in t.turns] == [turn.executions for turn in e.turns]


def test_groups_are_in_the_order_of_the_data_whatever_verl_calls_them(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    tasks = [make_task(n) for n in range(12)]
    for place in (7, 11, 0, 10, 2, 9):
        recorder.add(f"uid-{99 - place}", place, attempt(tasks[place], 0, "72"), {}, validation=False)
    end_step(recorder, 1, {})
    assert [g.task.id for g in read_groups(run.step_trajectories(1))] == [tasks[n].id for n in (0, 2, 7, 9, 10, 11)]


def test_one_task_drawn_twice_is_two_groups(tmp_path: Path) -> None:
    """Beyond the end of the data verl begins it anew, with other names."""
    recorder, run = recorder_of(tmp_path / "x")
    for uid in ("a", "b"):
        for sample in (1, 0):
            recorder.add(uid, 4, attempt(RIGHT, sample, "72"), {}, validation=False)
    end_step(recorder, 1, {"a_0": 1.0, "b_0": 2.0})
    found = read_groups(run.step_trajectories(1))
    assert [[(t.sample, t.advantage) for t in g.trajectories] for g in found] == [
        [(0, 1.0), (1, None)], [(0, 2.0), (1, None)]
    ]  # fmt: skip


def test_a_group_that_is_lost_whole(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    groups = [
        TrajectoryGroup(RIGHT, [], [lost(RIGHT, 0), lost(RIGHT, 1)]),
        TrajectoryGroup(LEFT, [attempt(LEFT, 0, "5")]),
    ]
    send(recorder, groups)
    metrics = end_step(recorder, 1, {})
    assert {k: v for k, v in metrics.items() if not k.startswith("grading/")} == rollout_metrics(groups)
    assert metrics["infra/trajectories"] == 2.0
    found = read_groups(run.step_trajectories(1))
    assert [(len(g.trajectories), len(g.infra_failed)) for g in found] == [(0, 2), (1, 0)]


def test_everything_lost_is_a_step_too(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    send(recorder, [TrajectoryGroup(RIGHT, [], [lost(RIGHT, 0)])])
    metrics = end_step(recorder, 1, {})
    assert (metrics["infra/trajectories"], metrics["rollout/trajectories"]) == (1.0, 0.0)
    (group,) = read_groups(run.step_trajectories(1))
    assert [t.stop_reason for t in group.infra_failed] == [StopReason.INFRA]


def test_steps_do_not_leak_into_each_other(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    first, second = a_step(), [TrajectoryGroup(make_task(7), [attempt(make_task(7), 0, "1")])]
    send(recorder, first)
    end_step(recorder, 1, {"g0_0": 9.0})
    send(recorder, second, counts={"grading/crashes": 2.0})
    metrics = end_step(recorder, 2, {})
    assert metrics == rollout_metrics(second) | {"grading/crashes": 2.0}
    (group,) = read_groups(run.step_trajectories(2))
    assert (group.task, [t.advantage for t in group.trajectories]) == (make_task(7), [None])
    assert len(read_groups(run.step_trajectories(1))) == 2
    empty = end_step(recorder, 3, {})
    assert empty == rollout_metrics([])


def test_a_step_is_on_the_disk_before_the_next_ones_metrics(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    for step in (1, 2, 3):
        send(recorder, a_step())
        recorder.end_step(step, {})
        assert set(range(1, step)) <= set(run.trajectory_steps())
    recorder.flush()
    recorder.flush()
    assert run.trajectory_steps() == [1, 2, 3]


def test_restarts_are_those_of_each_node(tmp_path: Path) -> None:
    """Every worker of a node sees the same ones, some of them later; a node's number never falls."""
    recorder, _ = recorder_of(tmp_path / "x")
    seen = [("a", 1), ("a", 2), ("a", 1), ("b", 0), ("c", 3)]
    for sample, restarts in enumerate(seen):
        recorder.add("g", 0, attempt(RIGHT, sample, "72"), {}, validation=sample == 4, restarts=restarts)
    assert recorder.end_step(1, {})[RESTARTS] == 5.0
    recorder.add("h", 1, attempt(LEFT, 0, "5"), {}, validation=False, restarts=("b", 1))
    assert recorder.end_step(2, {})[RESTARTS] == 6.0


def test_a_disk_that_fails_ends_the_run_a_step_later(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    (run.path / "trajectories").rmdir()
    (run.path / "trajectories").write_text("in the way")
    send(recorder, a_step())
    assert recorder.end_step(1, {})
    send(recorder, a_step())
    with pytest.raises(InfraError, match=r"^trajectories could not be written to .*/x \(Not a directory\)$"):
        recorder.end_step(2, {})


def test_a_validation_between_two_steps_is_kept_apart(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x")
    trained, validated = a_step(), [TrajectoryGroup(LEFT, [attempt(LEFT, n, str(4 + n)) for n in range(3)])]
    send(recorder, trained)
    send(recorder, validated, validation=True, counts={"grading/hard": 100.0})
    found = recorder.end_validation(7)
    assert found == validation_metrics(validated, 2, 100, 7)
    assert found["val-core/world/acc/mean@2"] == pytest.approx(1 / 3)
    assert run.eval_labels() == [] and run.summary() == {}  # an evaluation within training has neither
    metrics = end_step(recorder, 7, {})
    assert metrics == rollout_metrics(trained) | {"grading/hard": 6.0, "grading/timeouts": 0.0}
    send(recorder, validated[:1], validation=True, uid="later")
    assert recorder.end_validation(8) == validation_metrics(validated[:1], 2, 100, 8)


def test_an_evaluation_leaves_its_file_and_its_summary(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x", "evaluate", model={"path": "some/model"})
    groups = a_step()
    send(recorder, groups, validation=True)
    metrics = recorder.end_validation(0)
    assert metrics == validation_metrics(groups, 2, 100, 0)
    assert metrics["val-aux/infra/trajectories"] == 1.0
    expected = evaluation_summary(groups, 2, 100, 4)
    assert run.summary() == {"eval": json.loads(json.dumps(expected)), "model": "some/model", "seed": 4}
    assert run.eval_labels() == ["model"]
    found = read_groups(run.eval_trajectories("model"))
    assert [[t.sample for t in g.trajectories] for g in found] == [[0, 1, 2], [0, 2]]
    assert [len(g.infra_failed) for g in found] == [0, 1]
    assert run.trajectory_steps() == []


def test_an_evaluation_that_lost_everything_is_no_accuracy_of_zero(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x", "evaluate")
    send(recorder, [TrajectoryGroup(RIGHT, [], [lost(RIGHT, 0)])], validation=True)
    with pytest.raises(InfraError, match="every trajectory of the evaluation was lost"):
        recorder.end_validation(0)
    assert run.summary() == {}
    (group,) = read_groups(run.eval_trajectories("model"))
    assert len(group.infra_failed) == 1


def test_a_validation_by_verls_own_loop_has_no_metrics_of_ours(tmp_path: Path) -> None:
    recorder, run = recorder_of(tmp_path / "x", "evaluate")
    assert recorder.end_validation(0) == {}
    assert run.summary() == {} and run.eval_labels() == []


def test_workers_get_the_recipe_with_its_secret_and_the_folder_does_not(tmp_path: Path) -> None:
    recipe = recipe_of(sandbox={"token": "s3cret", "url": "http://a:1"})
    run = RunFolder(tmp_path / "x")
    run.write_config(recipe)
    recorder = Recorder(secret_tree(recipe), str(run.path), "rl", "/typed/here")
    tree, here = recorder.told()
    assert here == "/typed/here"
    assert make_recipe(tree) == recipe
    assert json.loads(json.dumps(tree)) == tree  # plain: it travels through Ray
    end_step(recorder, 1, {})
    texts = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert texts and not any(b"s3cret" in text for text in texts)
    assert "s3cret" not in recipe_toml(recipe)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        Recorder(secret_tree(Recipe()), str(tmp_path / "nothing"), "rl")
