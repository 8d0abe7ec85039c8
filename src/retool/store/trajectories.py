"""Trajectories as Parquet: one row each, readable by any data frame, and whole enough to be read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from retool.errors import DataError
from retool.store.files import write_file
from retool.types import (
    ExecutionResult,
    ExecutionStatus,
    Finish,
    Grade,
    StopReason,
    Task,
    TokenOutput,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

_CALL = pa.struct([("code", pa.string()), ("error", pa.string()), ("raw", pa.string())])
_EXECUTION = pa.struct(
    [
        ("status", pa.string()),
        ("stdout", pa.string()),
        ("stderr", pa.string()),
        ("exit_code", pa.int32()),
        ("duration_s", pa.float64()),
        ("truncated", pa.bool_()),
    ]
)
_TURN = pa.struct(
    [
        ("sampled", pa.int32()),
        ("observed", pa.int32()),
        ("finish", pa.string()),
        ("policy_version", pa.int32()),
        ("text", pa.string()),
        ("observation_text", pa.string()),
        ("calls", pa.list_(_CALL)),
        ("executions", pa.list_(_EXECUTION)),
    ]
)
SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("lost", pa.bool_()),
        ("task_id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.string()),
        ("answer", pa.string()),
        ("meta", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("prompt_length", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.int8())),
        ("logprobs", pa.list_(pa.float32())),
        ("turns", pa.list_(_TURN)),
        ("stop_reason", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("correct", pa.bool_()),
        ("prediction", pa.string()),
        ("sandbox_s", pa.float64()),
    ]
)
"""One row a trajectory. ``messages`` and ``meta`` are JSON. ``ids``, ``mask`` and ``logprobs`` (float32) are aligned
and begin with the prompt; ``turns[i].sampled`` and ``.observed`` count the tokens by which to cut them again."""


def _text(text: str) -> str:
    """Parquet holds UTF-8: a lone surrogate, which code may print, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _turn_row(turn: Turn) -> dict[str, Any]:
    return {
        "sampled": len(turn.output.token_ids),
        "observed": len(turn.observation_ids),
        "finish": turn.output.finish.value,
        "policy_version": turn.output.policy_version,
        "text": _text(turn.text),
        "observation_text": _text(turn.observation_text),
        "calls": [
            {
                "code": None if c.code is None else _text(c.code),
                "error": c.error and _text(c.error),
                "raw": _text(c.raw),
            }
            for c in turn.calls
        ],
        "executions": [
            e
            and {
                "status": e.status.value,
                "stdout": _text(e.stdout),
                "stderr": _text(e.stderr),
                "exit_code": e.exit_code,
                "duration_s": e.duration_s,
                "truncated": e.truncated,
            }
            for e in turn.executions
        ],
    }


def _row(group: int, lost: bool, t: Trajectory) -> dict[str, Any]:
    return {
        "group": group,
        "lost": lost,
        "task_id": t.task.id,
        "source": t.task.source,
        "messages": json.dumps(t.task.messages),
        "answer": _text(t.task.answer),
        "meta": json.dumps(t.task.meta, default=str),
        "sample": t.sample,
        "text": _text("".join(turn.text + turn.observation_text for turn in t.turns)),
        "prompt_length": len(t.prompt_ids),
        "ids": t.ids_T,
        "mask": t.mask_T,
        "logprobs": t.logprobs_T,
        "turns": [_turn_row(turn) for turn in t.turns],
        "stop_reason": t.stop_reason and t.stop_reason.value,
        "reward": t.reward,
        "advantage": t.advantage,
        "correct": t.grade and t.grade.correct,
        "prediction": _text(t.grade.prediction) if t.grade and t.grade.prediction is not None else None,
        "sandbox_s": t.sandbox_s,
    }


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """``rows`` as a Parquet file, written aside and renamed."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    write_file(path, sink.getvalue().to_pybytes())


def write_trajectories(path: Path, groups: Sequence[TrajectoryGroup]) -> None:
    """Write groups, lost trajectories included, as one Parquet file of ``SCHEMA``."""
    rows = [
        _row(number, lost, trajectory)
        for number, group in enumerate(groups)
        for lost, members in ((False, group.trajectories), (True, group.infra_failed))
        for trajectory in members
    ]
    write_rows(path, rows, SCHEMA)


def _turn_of(row: dict[str, Any], ids: list[int], logprobs: list[float]) -> Turn:
    sampled = row["sampled"]
    output = TokenOutput(ids[:sampled], logprobs[:sampled], Finish(row["finish"]), row["policy_version"])
    return Turn(
        output=output,
        text=row["text"],
        calls=[ToolCall(**c) for c in row["calls"]],
        executions=[
            None if e is None else ExecutionResult(**(e | {"status": ExecutionStatus(e["status"])}))
            for e in row["executions"]
        ],
        observation_ids=ids[sampled:],
        observation_text=row["observation_text"],
    )


def _trajectory_of(row: dict[str, Any]) -> Trajectory:
    task = Task(row["task_id"], row["source"], json.loads(row["messages"]), row["answer"], json.loads(row["meta"]))
    start, turns = row["prompt_length"], []
    for turn in row["turns"]:
        end = start + turn["sampled"] + turn["observed"]
        turns.append(_turn_of(turn, row["ids"][start:end], row["logprobs"][start:end]))
        start = end
    return Trajectory(
        task=task,
        sample=row["sample"],
        prompt_ids=row["ids"][: row["prompt_length"]],
        turns=turns,
        stop_reason=StopReason(row["stop_reason"]) if row["stop_reason"] else None,
        reward=row["reward"],
        grade=None if row["correct"] is None else Grade(row["correct"], row["prediction"]),
        advantage=row["advantage"],
        sandbox_s=row["sandbox_s"],
    )


def read_groups(path: Path) -> list[TrajectoryGroup]:
    """The groups of a trajectory file as they were written; a group without any trajectory leaves no trace.

    Raises:
        DataError: the file is missing, or no trajectory file.
    """
    try:
        # a column that is missing would read as nulls
        if missing := [name for name in SCHEMA.names if name not in pq.read_schema(path).names]:
            raise OSError(f"no column {missing[0]}")
        rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no readable trajectory file ({reason}); name one that retool wrote") from None
    groups: dict[int, TrajectoryGroup] = {}
    for row in rows:
        trajectory = _trajectory_of(row)
        group = groups.setdefault(row["group"], TrajectoryGroup(trajectory.task, []))
        (group.infra_failed if row["lost"] else group.trajectories).append(trajectory)
    return list(groups.values())


def read_trajectories(path: Path) -> list[Trajectory]:
    """All trajectories of a file, group by group, the lost ones (``StopReason.INFRA``) last in their group.

    Raises:
        DataError: the file is missing, or no trajectory file.
    """
    return [t for group in read_groups(path) for t in (*group.trajectories, *group.infra_failed)]
