"""Tasks as the Parquet files that verl's RL data set reads, and back. Nothing here imports verl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from retool.config import RolloutConfig
from retool.errors import DataError
from retool.protocols import ToolFormat
from retool.store import write_rows
from retool.types import Task

TRAIN, EVAL = "train", "eval"
"""``extra_info.split``: what a row's trajectories are for."""

SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("data_source", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("index", pa.int64()), ("split", pa.string()), ("id", pa.string()), ("meta", pa.string())]),
        ),
    ]
)
"""One row a task. ``index`` counts the rows; ``meta`` is JSON."""


def write_tasks(path: Path, tasks: Iterable[Task], split: str) -> None:
    """``tasks``, in their order, as the file ``path``."""
    rows = [
        {
            "prompt": [{"role": m["role"], "content": m["content"]} for m in task.messages],
            "data_source": task.source,
            "reward_model": {"style": "rule", "ground_truth": task.answer},
            "extra_info": {
                "index": index,
                "split": split,
                "id": task.id,
                "meta": json.dumps(task.meta, default=str),
            },
        }
        for index, task in enumerate(tasks)
    ]
    write_rows(path, rows, SCHEMA)


def task_of(row: dict[str, Any]) -> Task:
    """The task of a row, as verl hands it to an agent loop (``raw_prompt`` is its name for the messages)."""
    info = row["extra_info"]
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["raw_prompt"]]
    answer = str(row["reward_model"]["ground_truth"])
    return Task(str(info["id"]), str(row["data_source"]), messages, answer, json.loads(info["meta"]))


def with_room(
    tasks: Sequence[Task], fmt: ToolFormat, config: RolloutConfig, complain: Callable[[str], None]
) -> list[Task]:
    """The tasks whose prompt leaves room for an answer; verl cannot hold a trajectory without one.

    Raises:
        DataError: there is none.
    """
    fits: dict[str, bool] = {}
    for task in tasks:
        if task.id not in fits:
            fits[task.id] = len(fmt.prompt_ids(task.messages, tools=config.tools)) < config.max_context
    kept = [task for task in tasks if fits[task.id]]
    if not kept:
        raise DataError(f"rollout.max_context = {config.max_context}: no prompt leaves room for an answer; raise it")
    if left_out := len(fits) - sum(fits.values()):
        complain(f"{left_out} of {len(fits)} prompts fill all of rollout.max_context = {config.max_context}: left out")
    return kept
