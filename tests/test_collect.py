"""What a step learns from: dynamic sampling, the overlong punishment, and the state that a checkpoint keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retool.collect import Collector
from retool.config import make_recipe
from retool.formats import make_format
from retool.grading.rewards import overlong_punishment
from retool.rollout import Rollout
from retool.store import read_groups, write_trajectories
from retool.types import Task, TrajectoryGroup
from tests.fakes import ScriptedPolicy, tiny_tokenizer

FMT = make_format(make_recipe({}).rollout, tiny_tokenizer())


class Numbers:
    """Task n asks for n; its answer is "1"."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int]] = []

    def train_tasks(self, first: int, count: int) -> list[Task]:
        self.drawn.append((first, count))
        return [
            Task(f"t{n}", "s", [{"role": "user", "content": f"number {n}"}], "1") for n in range(first, first + count)
        ]


Answer = Callable[[int, int], bool]
"""(task, sample) → whether that attempt is right."""


def collector(right: Answer, **rl: Any) -> Collector:
    """Attempts whose outcome is known beforehand. Sessions are named ``step/task/sample``."""
    recipe = make_recipe({"rl": {"prompts": 2, "group_size": 2} | rl, "rollout": {"tools": False, "max_context": 2000}})

    def say(session: str, turn: int) -> list[int]:
        _, task, sample = session.split("/")
        text = f"\\boxed{{{1 if right(int(task[1:]), int(sample)) else 2}}}"
        return [*FMT.tokenizer.encode(text, add_special_tokens=False), FMT.stop_token_ids[0]]

    rollout = Rollout(policy=ScriptedPolicy(say), fmt=FMT, sandbox=None, config=recipe.rollout)
    return Collector(recipe, rollout, Numbers())  # type: ignore[arg-type]


def names(groups: list[TrajectoryGroup]) -> list[str]:
    return [group.task.id for group in groups]


def odd_ones_teach(task: int, sample: int) -> bool:
    """Odd tasks are mixed; even ones are all right."""
    return task % 2 == 0 or sample == 0


DYNAMIC = {"enabled": True, "max_rounds": 4}


def test_without_dynamic_sampling_a_step_is_one_draw() -> None:
    c = collector(odd_ones_teach)
    for step in range(2):
        batch = asyncio.run(c.collect())
        assert names(batch.groups) == names(batch.rolled) == [f"t{2 * step}", f"t{2 * step + 1}"]
    assert (c.tasks, c.draws) == (4, 2)
    assert "sampling/rounds" not in batch.metrics


def test_groups_that_teach_nothing_are_replaced_until_the_batch_is_full() -> None:
    """Each draw of two has one mixed group: two draws fill the batch."""
    c = collector(odd_ones_teach, dynamic_sampling=DYNAMIC)
    batch = asyncio.run(c.collect())
    assert names(batch.groups) == ["t1", "t3"]
    assert names(batch.rolled) == ["t0", "t1", "t2", "t3"]
    assert {k: v for k, v in batch.metrics.items() if k.startswith("sampling/")} == {
        "sampling/rounds": 2, "sampling/replaced": 2, "sampling/surplus": 0, "sampling/missing": 0,
    }  # fmt: skip
    assert names(asyncio.run(c.collect()).groups) == ["t5", "t7"], "no task is drawn twice"


def test_groups_that_are_all_wrong_are_replaced_too() -> None:
    batch = asyncio.run(collector(lambda task, sample: task > 1 and sample == 0, dynamic_sampling=DYNAMIC).collect())
    assert names(batch.groups) == ["t2", "t3"]


def test_the_search_is_bounded_and_says_what_is_missing() -> None:
    c = collector(lambda task, sample: task != 5 or sample == 0, dynamic_sampling=DYNAMIC)
    batch = asyncio.run(c.collect())
    assert names(batch.groups) == ["t5"]
    assert (batch.metrics["sampling/rounds"], batch.metrics["sampling/missing"]) == (4, 1)


def only_the_first_two_teach(task: int, sample: int) -> bool:
    """Task 0 is all right, 1, 2, 3 are mixed, then odd ones."""
    return task == 0 or (task > 3 and task % 2 == 0) or sample == 0


@pytest.mark.parametrize("keep", [True, False])
def test_surplus_groups_are_kept_or_thrown_away(keep: bool) -> None:
    c = collector(only_the_first_two_teach, dynamic_sampling=DYNAMIC | {"keep_surplus": keep})
    first = asyncio.run(c.collect())
    assert names(first.groups) == ["t1", "t2"]
    assert first.metrics["sampling/surplus"] == 1
    second = asyncio.run(c.collect())
    assert names(second.groups) == (["t3", "t5"] if keep else ["t5", "t7"])
    assert "t3" not in names(second.rolled), "what was rolled in an earlier step is not counted again"


def test_a_collector_goes_on_where_its_state_was_written(tmp_path: Path) -> None:
    c = collector(only_the_first_two_teach, dynamic_sampling=DYNAMIC | {"keep_surplus": True})
    asyncio.run(c.collect())
    write_trajectories(tmp_path / "x.parquet", c.left_over())
    again = collector(only_the_first_two_teach, dynamic_sampling=DYNAMIC | {"keep_surplus": True})
    again.load(c.state(), read_groups(tmp_path / "x.parquet"))
    assert names(again.surplus) == names(c.surplus) == ["t3"]
    one, other = asyncio.run(c.collect()), asyncio.run(again.collect())
    assert names(one.groups) == names(other.groups)
    ids, ids_again = ([t.ids_T for g in batch.groups for t in g.trajectories] for batch in (one, other))
    assert ids == ids_again
    assert c.state() == again.state()


def test_the_overlong_punishment_worked_by_hand() -> None:
    """DAPO's figures: a limit of 20,480 tokens with a buffer of 4,096. Nothing up to 16,384; half at 18,432; all at the
    limit."""
    found = [overlong_punishment(n, 20480, 4096, 1.0) for n in (100, 16384, 17408, 18432, 20480, 30000)]
    assert found == [0, 0, -0.25, -0.5, -1, -1]
    assert overlong_punishment(20480, 20480, 0, 1.0) == 0
    assert overlong_punishment(18432, 20480, 4096, 0.6) == pytest.approx(-0.3)


def test_long_trajectories_are_punished_in_their_reward() -> None:
    c = collector(lambda task, sample: True, overlong={"buffer_share": 1.0, "penalty": 0.5})
    (group, _) = asyncio.run(c.collect()).groups
    length = group.trajectories[0].response_length
    limit = c.recipe.rollout.max_response_tokens
    assert group.trajectories[0].reward == pytest.approx(1 - 0.5 * length / limit)
    assert group.trajectories[0].grade is not None and group.trajectories[0].grade.correct
