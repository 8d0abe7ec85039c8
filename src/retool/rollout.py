"""Thinking, executing and reading the result, token by token: how a trajectory comes to be. No torch.

Tokens are only ever appended: a turn's sampled ids, then the observation's. Whatever ends a trajectory has its
``StopReason``; what the machine breaks is told apart from what the model does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from retool.config import Recipe, RolloutConfig
from retool.errors import InvariantError
from retool.protocols import Policy, Sandbox, ToolFormat
from retool.types import (
    ExecutionResult,
    ExecutionStatus,
    Finish,
    SamplingParams,
    StopReason,
    Task,
    TokenOutput,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

T = TypeVar("T")
MAX_PIECES = 64
"""Stop strings inside one call that are gone over; a model that repeats one without end must not be asked for ever."""
SEED_BITS = 63  # torch and numpy take seeds as signed 64-bit integers


@dataclass(frozen=True)
class Rollout:
    """Everything that the trajectories of a job share.

    Raises:
        ValueError: the config shows a tool, and there is no sandbox to run it.
    """

    policy: Policy
    fmt: ToolFormat
    sandbox: Sandbox | None
    """None only where ``config.tools`` is False."""
    config: RolloutConfig
    timeout_s: float = 30.0
    """For one run of code."""
    infra_retries: int = 2
    """How often an ``infra`` execution is tried again before its trajectory is given up; a stateful one is not: the
    interpreter that the machine lost took the earlier calls' work with it."""
    stateful: bool = False
    """One interpreter for all the calls of a trajectory."""

    def __post_init__(self) -> None:
        if self.config.tools and self.sandbox is None:
            raise ValueError("rollout.tools is on and sandbox is None: give a sandbox, or set rollout.tools = false")


def make_rollout(
    recipe: Recipe, policy: Policy, fmt: ToolFormat, sandbox: Sandbox | None, config: RolloutConfig | None = None
) -> Rollout:
    """What the recipe says of a rollout; ``config``: other limits or another sampling than the recipe's."""
    return Rollout(
        policy=policy,
        fmt=fmt,
        sandbox=sandbox,
        config=config or recipe.rollout,
        timeout_s=recipe.sandbox.timeout_s,
        infra_retries=recipe.sandbox.retries,
        stateful=recipe.sandbox.stateful,
    )


def turn_seed(seed: int, step: int, task_id: str, sample: int, turn: int) -> int:
    """A turn's seed (63 bits), from its identity alone: equal in every process and on every machine."""
    return _seed_of([seed, step, task_id, sample, turn])


def _seed_of(identity: list[int | str]) -> int:
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)


def session_id(step: int, task_id: str, sample: int) -> str:
    return f"{step}/{task_id}/{sample}"


async def run_trajectory(
    rollout: Rollout,
    task: Task,
    sample: int,
    *,
    seed: int,
    step: int,
    start: Trajectory | None = None,
    pause: asyncio.Event | None = None,
) -> Trajectory:
    """One attempt at a task, ended by a ``StopReason``. The sessions at the policy and the sandbox are released however
    this ends.

    Args:
        start: a paused attempt to go on with; it is left as it is.
        pause: once it is set, and the policy interrupted, the attempt is given back as it stands, ``stop_reason`` None.
            A turn that was cut off is the last one, with ``Finish.ABORT``; one whose code was cut off has its calls and
            no executions, and its code will run again from the start.

    Raises:
        InvariantError: the policy broke its promise, or the ids are not what was sampled and observed.
        InfraError: the sandbox cannot run anything at all.
    """
    if start is None:
        trajectory = Trajectory(task, sample, rollout.fmt.prompt_ids(task.messages, tools=rollout.config.tools))
    else:
        trajectory = replace(start, turns=list(start.turns))  # a new object has derived nothing yet
    begun = _pop_cut_turn(trajectory)
    session = session_id(step, task.id, sample)
    ids = list(trajectory.ids_T)
    try:
        while trajectory.stop_reason is None and not (pause and pause.is_set()):
            turn = turn_seed(seed, step, task.id, sample, len(trajectory.turns))
            await _take_turn(rollout, trajectory, ids, session, turn, begun=begun, pause=pause)
            begun = None
    finally:
        rollout.policy.release(session)
        if rollout.stateful and rollout.sandbox is not None:
            rollout.sandbox.release(session)
    if begun is not None and start is not None:  # paused again before it could go on
        trajectory.turns.append(start.turns[-1])
        ids += begun.token_ids
    trajectory = replace(trajectory)
    _check_trajectory(trajectory, ids)
    return trajectory


def _pop_cut_turn(trajectory: Trajectory) -> TokenOutput | None:
    """Take the turn out that was cut off, or whose code was, if the last one is such. A paused trajectory has no stop
    reason, and as its last turn one that was cut while it was sampled (ABORT), one whose code was cut (calls without
    executions), or a whole one with its observation."""
    if trajectory.stop_reason is None and trajectory.turns and _is_cut(trajectory.turns[-1]):
        return trajectory.turns.pop().output
    return None


def _is_cut(turn: Turn) -> bool:
    return turn.output.finish is Finish.ABORT or len(turn.executions) < len(turn.calls)


async def run_groups(
    rollout: Rollout,
    tasks: Sequence[Task],
    group_size: int,
    *,
    seed: int,
    step: int,
    on_trajectory: Callable[[Trajectory], None] | None = None,
) -> list[TrajectoryGroup]:
    """``group_size`` attempts at each task, all at once; one group per task, in the tasks' order, its trajectories in
    the order of their samples. ``on_trajectory`` is called as each one ends.

    A task that occurs n times gets n groups, whose samples are numbered on. On an error, or when cancelled, nothing is
    left running.

    Raises:
        whatever ``run_trajectory`` raises, of the first one that does.
    """

    async def run(task: Task, sample: int) -> Trajectory:
        trajectory = await run_trajectory(rollout, task, sample, seed=seed, step=step)
        if on_trajectory is not None:
            on_trajectory(trajectory)
        return trajectory

    numbers = sample_numbers(tasks, group_size)
    finished = await run_all(run(task, n) for task, own in zip(tasks, numbers, strict=True) for n in own)
    groups = []
    for index, task in enumerate(tasks):
        groups.append(make_group(task, finished[index * group_size : (index + 1) * group_size]))
    return groups


def sample_numbers(tasks: Sequence[Task], group_size: int) -> list[range]:
    """The numbers of each task's trajectories: two groups of one task must not share sessions, nor random numbers."""
    seen: Counter[str] = Counter()
    numbers = []
    for task in tasks:
        numbers.append(range(seen[task.id], seen[task.id] + group_size))
        seen[task.id] += group_size
    return numbers


def make_group(task: Task, trajectories: Sequence[Trajectory]) -> TrajectoryGroup:
    """The group of a task's finished trajectories, those that the infrastructure lost apart."""
    lost = [t for t in trajectories if t.stop_reason is StopReason.INFRA]
    return TrajectoryGroup(task, [t for t in trajectories if t.stop_reason is not StopReason.INFRA], lost)


async def _take_turn(
    rollout: Rollout,
    trajectory: Trajectory,
    ids: list[int],
    session: str,
    seed: int,
    *,
    begun: TokenOutput | None = None,
    pause: asyncio.Event | None = None,
) -> None:
    """Sample a turn (``begun`` is what there is of it already), run its calls, append what came of it to ``trajectory``
    and ``ids``; set the stop reason if the trajectory ends here."""
    room, full = _room(rollout.config, trajectory)
    if room < 1:
        trajectory.stop_reason = full
        return
    output, text = await _sample(rollout, ids, _sampling(rollout, room, seed), session, begun, pause)
    ids += output.token_ids
    if output.finish is Finish.ABORT and pause and pause.is_set():
        if output.token_ids:
            trajectory.turns.append(Turn(output, text))
        return
    calls = rollout.fmt.find_calls(text) if rollout.config.tools else []

    ending = _ending(rollout.config, trajectory, output, calls, full)
    if ending is not None:
        trajectory.turns.append(Turn(output, text, calls, [None] * len(calls)))
        trajectory.stop_reason = ending
        return

    started = time.monotonic()
    # What was cut off once is waited for: slow code would else be begun anew in each step, and never end.
    was_cut = begun is not None and begun.finish is Finish.STOP
    executions = await _unless_paused(_execute(rollout, calls, session), None if was_cut else pause)
    trajectory.sandbox_s += time.monotonic() - started
    turn = Turn(output, text, calls, executions or [])
    trajectory.turns.append(turn)
    if executions is None:
        return
    if any(result is not None and result.status is ExecutionStatus.INFRA for result in executions):
        trajectory.stop_reason = StopReason.INFRA
        return
    observation = _observe(rollout, output, calls, executions)
    room, full = _room(rollout.config, trajectory)
    if len(observation) >= room:  # no place for a sampled token after it
        trajectory.stop_reason = full
        return
    trajectory.turns[-1] = replace(turn, observation_ids=observation, observation_text=rollout.fmt.decode(observation))
    ids += observation


async def _sample(
    rollout: Rollout,
    ids: list[int],
    params: SamplingParams,
    session: str,
    begun: TokenOutput | None,
    pause: asyncio.Event | None,
) -> tuple[TokenOutput, str]:
    """What the policy says next, and its text. A stop string inside a call that is still being written (a program that
    prints the tag) ends nothing: the same turn goes on, as one that was cut off does, with random numbers of its own.
    """
    if begun is not None and begun.finish is Finish.STOP:  # it was whole, and its code was cut off
        return begun, rollout.fmt.decode(begun.token_ids)
    so_far = begun or TokenOutput([], [], Finish.STOP)
    for piece in range(1, MAX_PIECES + 1):
        done = len(so_far.token_ids)
        if pause and pause.is_set():
            output = replace(so_far, finish=Finish.ABORT)
        else:
            part = params
            if done:
                part = replace(params, max_tokens=params.max_tokens - done, seed=_seed_of([params.seed, done]))
            # The policy may keep the list that it is given; ours grows.
            output = await rollout.policy.generate([*ids, *so_far.token_ids], part, session=session)
            _check_output(output, part)
            output = _joined(so_far, output) if done else output
        text = rollout.fmt.decode(output.token_ids)
        ended = output.finish is not Finish.STOP or output.token_ids[-1] in params.stop_token_ids
        if ended or not params.stop or rollout.fmt.is_over(text) or piece == MAX_PIECES:
            break
        if len(output.token_ids) >= params.max_tokens:
            output = replace(output, finish=Finish.LENGTH)
            break
        so_far = output
    return output, text


def _joined(first: TokenOutput, second: TokenOutput) -> TokenOutput:
    """Two pieces of a turn as one, which is as old as its oldest token."""
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        policy_version=min(first.policy_version, second.policy_version),
    )


def _room(config: RolloutConfig, trajectory: Trajectory) -> tuple[int, StopReason]:
    """How many tokens may still be appended, and which limit says so."""
    response = config.max_response_tokens - trajectory.response_length
    context = config.max_context - len(trajectory.prompt_ids) - trajectory.response_length
    return (response, StopReason.MAX_TOKENS) if response <= context else (context, StopReason.CONTEXT_FULL)


def _sampling(rollout: Rollout, room: int, seed: int) -> SamplingParams:
    config = rollout.config
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=room,
        stop=rollout.fmt.stop if config.tools else (),
        stop_token_ids=rollout.fmt.stop_token_ids,
        seed=seed,
    )


def _ending(
    config: RolloutConfig, trajectory: Trajectory, output: TokenOutput, calls: list[ToolCall], full: StopReason
) -> StopReason | None:
    """Why the trajectory ends with this turn, its calls not executed; None if they are to be."""
    if output.finish is Finish.ABORT:
        return StopReason.INFRA
    if output.finish is Finish.LENGTH:
        return full
    if not calls:
        return StopReason.ANSWERED
    malformed = sum(call.code is None for turn in trajectory.turns for call in turn.calls)
    if malformed + sum(call.code is None for call in calls) > config.max_malformed:
        return StopReason.MALFORMED
    return StopReason.MAX_TURNS if len(trajectory.turns) + 1 >= config.max_turns else None


async def _execute(rollout: Rollout, calls: list[ToolCall], session: str) -> list[ExecutionResult | None]:
    """What came of a turn's calls: all at once, or one after the other where they share an interpreter."""
    if not rollout.stateful:
        return await run_all(_answer(rollout, call) for call in calls)
    executions: list[ExecutionResult | None] = []
    for call in calls:
        lost = any(result is not None and result.status is ExecutionStatus.INFRA for result in executions)
        executions.append(None if lost else await _continue(rollout, call, session))
    return executions


async def _unless_paused(work: Coroutine[Any, Any, T], pause: asyncio.Event | None) -> T | None:
    """What ``work`` returns; None where the pause comes first, and ``work`` is cancelled."""
    if pause is None:
        return await work
    doing, paused = asyncio.ensure_future(work), asyncio.ensure_future(pause.wait())
    try:
        await asyncio.wait({doing, paused}, return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        doing.cancel()
        paused.cancel()
        await asyncio.gather(doing, paused, return_exceptions=True)


async def _continue(rollout: Rollout, call: ToolCall, session: str) -> ExecutionResult | None:
    if call.code is None or rollout.sandbox is None:
        return None
    return await rollout.sandbox.execute(call.code, rollout.timeout_s, session=session)


async def _answer(rollout: Rollout, call: ToolCall) -> ExecutionResult | None:
    """The call's run, tried again while the sandbox itself fails; None for a malformed call."""
    if call.code is None or rollout.sandbox is None:
        return None
    result = await rollout.sandbox.execute(call.code, rollout.timeout_s)
    for _ in range(rollout.infra_retries):
        if result.status is not ExecutionStatus.INFRA:
            break
        result = await rollout.sandbox.execute(call.code, rollout.timeout_s)
    return result


def _observe(
    rollout: Rollout, output: TokenOutput, calls: list[ToolCall], executions: list[ExecutionResult | None]
) -> list[int]:
    """The observation's ids; each call's text is cut to ``max_observation_tokens``, the template's own come on top."""
    texts = []
    for call, execution in zip(calls, executions, strict=True):
        text = execution.text if execution is not None else f"Error: {call.error}"
        texts.append(rollout.fmt.truncate(text, rollout.config.max_observation_tokens))
    return rollout.fmt.observation_ids(texts, output)


async def run_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. On the first error, or when cancelled, the rest are cancelled and awaited before
    that error is raised: none is left running, and no ``finally`` is skipped."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _check_output(output: TokenOutput, params: SamplingParams) -> None:
    if len(output.logprobs) != len(output.token_ids):
        raise InvariantError(f"policy: {len(output.token_ids)} tokens with {len(output.logprobs)} log-probabilities")
    if not all(map(math.isfinite, output.logprobs)):
        raise InvariantError("policy: the log-probability of a sampled token is not finite")
    if len(output.token_ids) > params.max_tokens:
        raise InvariantError(f"policy: {len(output.token_ids)} tokens where {params.max_tokens} were allowed")
    if not output.token_ids and output.finish is not Finish.ABORT:
        raise InvariantError(f"policy: finished ({output.finish.value}) without sampling a token")


def _check_trajectory(trajectory: Trajectory, ids: list[int]) -> None:
    if trajectory.ids_T != ids:
        raise InvariantError(f"task {trajectory.task.id}: the trajectory's ids are not those that the policy continued")
    if not len(ids) == len(trajectory.mask_T) == len(trajectory.logprobs_T):
        raise InvariantError(f"task {trajectory.task.id}: ids, mask and log-probabilities are not aligned")
    whole = trajectory.turns if trajectory.stop_reason else trajectory.turns[:-1]
    if any(len(turn.executions) != len(turn.calls) for turn in whole):
        raise InvariantError(f"task {trajectory.task.id}: executions are not aligned with calls")
