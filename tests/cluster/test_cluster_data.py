"""Tasks as verl's Parquet files and back, and those that leave no room for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retool.cluster.data import EVAL, TRAIN, task_of, with_room, write_tasks
from retool.config import RolloutConfig
from retool.errors import DataError
from retool.formats import make_format
from retool.types import Task
from tests.fakes import tiny_tokenizer

FMT = make_format(RolloutConfig(), tiny_tokenizer())
SYSTEM = {"role": "system", "content": "Solve it.\n"}


def task(number: int, question: str = "2 + 2?", **meta: Any) -> Task:
    return Task(f"world/train/{number}", "world", [SYSTEM, {"role": "user", "content": question}], "4", meta)


def as_verl_hands_it(row: dict[str, Any]) -> dict[str, Any]:
    """verl's data set renames the messages, and its batches hold what is no tensor in arrays of objects."""
    given = dict(row)
    messages = np.empty(len(given["prompt"]), dtype=object)
    messages[:] = given.pop("prompt")
    extra = {"uid": "u", "session_id": 3, "global_steps": 7, "index": given["extra_info"]["index"], "tools_kwargs": {}}
    return {**given, "raw_prompt": messages, **extra}


def read_back(path: Path) -> list[Task]:
    return [task_of(as_verl_hands_it(row)) for row in pq.read_table(path).to_pylist()]


def test_the_columns_are_those_that_verl_reads(tmp_path: Path) -> None:
    write_tasks(tmp_path / "x.parquet", [task(0, family="mul"), task(1)], TRAIN)
    first, second = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert first == {
        "prompt": [SYSTEM, {"role": "user", "content": "2 + 2?"}],
        "data_source": "world",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0, "split": "train", "id": "world/train/0", "meta": '{"family": "mul"}'},
    }
    assert (second["extra_info"]["index"], second["extra_info"]["meta"]) == (1, "{}")


def test_the_order_and_what_occurs_twice_are_kept(tmp_path: Path) -> None:
    tasks = [task(n) for n in (5, 2, 9, 2)]
    write_tasks(tmp_path / "x.parquet", iter(tasks), EVAL)
    assert read_back(tmp_path / "x.parquet") == tasks
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [(row["extra_info"]["index"], row["extra_info"]["split"]) for row in rows] == [
        (0, "eval"), (1, "eval"), (2, "eval"), (3, "eval")
    ]  # fmt: skip


def test_a_file_that_is_there_is_replaced_whole(tmp_path: Path) -> None:
    write_tasks(tmp_path / "x.parquet", [task(n) for n in range(3)], TRAIN)
    write_tasks(tmp_path / "x.parquet", [task(8)], TRAIN)
    assert read_back(tmp_path / "x.parquet") == [task(8)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]


TEXT = st.text(st.characters(codec="utf-8"))
TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TASKS = st.builds(
    Task,
    TEXT,
    TEXT,
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}), min_size=1),
    TEXT,
    st.dictionaries(TEXT, TREE, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tasks=st.lists(TASKS, max_size=4))
def test_any_task_comes_back_as_it_was(tasks: list[Task], tmp_path: Path) -> None:
    write_tasks(tmp_path / "x.parquet", tasks, TRAIN)
    assert read_back(tmp_path / "x.parquet") == tasks


def test_what_json_does_not_know_becomes_text(tmp_path: Path) -> None:
    write_tasks(tmp_path / "x.parquet", [task(0, path=Path("a/b"))], TRAIN)
    assert read_back(tmp_path / "x.parquet")[0].meta == {"path": "a/b"}


# --- room for an answer -----------------------------------------------------------------------------------------------


def length_of(one: Task, tools: bool) -> int:
    return len(FMT.prompt_ids(one.messages, tools=tools))


@pytest.mark.parametrize("tools", [True, False])
def test_a_prompt_that_fills_the_context_is_left_out_and_counted(tools: bool) -> None:
    """One token of room is room; none is none. A task that was drawn twice is counted once."""
    short, fits, full, over = (task(n, "x" * (10 + 10 * n)) for n in range(4))
    full = Task(full.id, full.source, [SYSTEM, {"role": "user", "content": "x" * 31}], "4")
    fits = Task(fits.id, fits.source, [SYSTEM, {"role": "user", "content": "x" * 30}], "4")
    assert length_of(full, tools) == length_of(fits, tools) + 1
    config = RolloutConfig(max_context=length_of(full, tools), max_response_tokens=5, tools=tools)
    said: list[str] = []
    tasks = [over, short, full, fits, over, short]
    assert with_room(tasks, FMT, config, said.append) == [short, fits, short]
    assert len(said) == 1 and said[0].startswith("2 of 4 prompts fill all of rollout.max_context")
    assert str(config.max_context) in said[0]


def test_where_all_have_room_nothing_is_said() -> None:
    said: list[str] = []
    tasks = [task(1), task(0)]
    assert with_room(tasks, FMT, RolloutConfig(max_context=5000), said.append) == tasks
    assert said == []


def test_where_none_has_room_the_setting_is_named() -> None:
    with pytest.raises(DataError, match=r"^rollout.max_context = 9: no prompt leaves room for an answer; raise it$"):
        with_room([task(0)], FMT, RolloutConfig(max_context=9, max_response_tokens=5), lambda line: None)
