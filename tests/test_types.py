from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.types import (
    ExecutionResult,
    ExecutionStatus,
    Finish,
    SamplingParams,
    Task,
    TokenOutput,
    ToolCall,
    Trajectory,
    Turn,
)

TASK = Task(id="t/1", source="t", messages=[{"role": "user", "content": "1 + 1?"}], answer="2")


def turn(sampled: list[int], observed: list[int], calls: int = 0) -> Turn:
    output = TokenOutput(sampled, [-float(i) / 1000 for i in sampled], Finish.STOP)
    return Turn(output, calls=[ToolCall("1") for _ in range(calls)], observation_ids=observed)


IDS = st.lists(st.integers(1, 1000), max_size=5)
TRAJECTORIES = st.builds(
    lambda prompt, pairs: Trajectory(TASK, 0, prompt, [turn(*pair) for pair in pairs]),
    IDS,
    st.lists(st.tuples(IDS, IDS), max_size=4),
)


@given(TRAJECTORIES)
def test_ids_mask_and_logprobs_are_aligned(trajectory: Trajectory) -> None:
    ids, mask, logprobs = trajectory.ids_T, trajectory.mask_T, trajectory.logprobs_T
    assert len(ids) == len(mask) == len(logprobs)
    sampled = [i for t in trajectory.turns for i in t.output.token_ids]
    assert [i for i, m in zip(ids, mask, strict=True) if m] == sampled
    # turn() gives every sampled token a log-probability that tells which token it is.
    assert [p for p, m in zip(logprobs, mask, strict=True) if m] == [-i / 1000 for i in sampled]
    assert all(p == 0.0 for p, m in zip(logprobs, mask, strict=True) if not m)
    assert ids[: len(trajectory.prompt_ids)] == trajectory.prompt_ids
    assert trajectory.response_length == len(ids) - len(trajectory.prompt_ids)


def test_a_trajectory_by_hand() -> None:
    trajectory = Trajectory(TASK, 0, [1, 2], [turn([3, 4], [5], calls=2), turn([6], [])])
    assert trajectory.ids_T == [1, 2, 3, 4, 5, 6]
    assert trajectory.mask_T == [0, 0, 1, 1, 0, 1]
    assert trajectory.logprobs_T == [0.0, 0.0, -0.003, -0.004, 0.0, -0.006]
    assert trajectory.response_length == 4
    assert trajectory.num_calls == 2


@pytest.mark.parametrize(
    ("turns", "num_turns"),
    [
        ([turn([3], [])], 2),  # user, assistant
        ([turn([3], [5], calls=1), turn([6], [])], 4),  # user, assistant, tool, assistant
        ([turn([3], [5], calls=1), turn([6], [7], calls=1), turn([8], [])], 6),
        ([turn([3], [], calls=1)], 2),  # its call was never answered
    ],
)
def test_num_turns_is_verls(turns: list[Turn], num_turns: int) -> None:
    assert Trajectory(TASK, 0, [1], turns).num_turns == num_turns


def test_a_trajectory_does_not_change_its_prompt() -> None:
    prompt = [1, 2]
    trajectory = Trajectory(TASK, 0, prompt, [turn([3], [4])])
    assert trajectory.ids_T == [1, 2, 3, 4]
    assert prompt == [1, 2]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (ExecutionResult(ExecutionStatus.OK, stdout="2\n", exit_code=0), "2"),
        (ExecutionResult(ExecutionStatus.OK, exit_code=0), ""),
        (ExecutionResult(ExecutionStatus.OK, stdout="a\n\nb\n", stderr="warn\n"), "a\n\nb\nwarn"),
        (ExecutionResult(ExecutionStatus.ERROR, stderr="NameError: x\n", exit_code=1), "NameError: x"),
        (ExecutionResult(ExecutionStatus.TIMEOUT, stdout="1\n"), "1\nTimeoutError: the code ran out of time"),
        (ExecutionResult(ExecutionStatus.MEMORY), "MemoryError: the code ran out of memory"),
        (ExecutionResult(ExecutionStatus.OUTPUT_LIMIT, stdout="x"), "x\nOutputLimit: the output was cut"),
        (ExecutionResult(ExecutionStatus.KILLED, exit_code=-9), "Killed: exit code -9"),
    ],
)
def test_what_a_model_is_shown_of_a_run(result: ExecutionResult, text: str) -> None:
    assert result.text == text


def test_no_bad_ending_looks_like_silence() -> None:
    """An ending that printed nothing must still tell the model something; INFRA is never shown to it."""
    shown = {status: ExecutionResult(status).text for status in ExecutionStatus}
    silent = {status for status, text in shown.items() if not text}
    assert silent == {ExecutionStatus.OK, ExecutionStatus.ERROR, ExecutionStatus.INFRA}


def test_a_result_is_json_as_it_stands() -> None:
    result = ExecutionResult(ExecutionStatus.TIMEOUT, stdout="ü", duration_s=0.5, truncated=True)
    assert ExecutionResult(**json.loads(json.dumps(dataclasses.asdict(result)))) == result


@pytest.mark.parametrize("value", [TASK, SamplingParams(), ExecutionResult(ExecutionStatus.OK), turn([1], [])])
def test_what_was_recorded_cannot_be_set_anew(value: object) -> None:
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
