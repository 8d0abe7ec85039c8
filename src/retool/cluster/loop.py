"""verl's agent loop: a trajectory is made by ``rollout.run_trajectory``, with verl's servers as its policy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from dataclasses import dataclass
from typing import Any

import ray
from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

from retool.cluster.data import EVAL, task_of
from retool.cluster.policy import ServerPolicy
from retool.cluster.recorder import NAME, RUNNER
from retool.cluster.sandbox import NodeSandbox, open_node_sandbox
from retool.config import Recipe, make_recipe
from retool.errors import InfraError, ReToolError, UserError
from retool.formats import make_format
from retool.formats.chat import ChatFormat
from retool.grading.grader import LOST_S, judge
from retool.grading.rewards import punish_overlong
from retool.grading.verifier import LIMIT_S
from retool.protocols import Sandbox
from retool.rollout import Rollout, make_group, make_rollout, run_trajectory
from retool.types import StopReason, Trajectory

_log = logging.getLogger(__name__)


@dataclass
class Shared:
    """What all trajectories of a worker process share."""

    recipe: Recipe
    recorder: Any
    fmt: ChatFormat
    sandbox: Sandbox | None
    grading: asyncio.Lock
    """The verifier has one budget at a time."""
    step: int = -1
    left_s: float = 0.0
    """What this step's hostile answers may still cost this worker."""


_opening = asyncio.Lock()
_shared: list[Shared] = []
"""Of this process: one, once its first trajectory has begun."""


async def _open(tokenizer: Any) -> Shared:
    async with _opening:
        if not _shared:
            recorder = ray.get_actor(NAME)
            tree, here = await recorder.told.remote()
            if here and here not in sys.path:
                sys.path.insert(0, here)
            recipe = make_recipe(tree)
            sandbox = await open_node_sandbox(recipe.sandbox) if recipe.rollout.tools else None
            fmt = make_format(recipe.rollout, tokenizer)
            _shared.append(Shared(recipe, recorder, fmt, sandbox, asyncio.Lock()))
    return _shared[0]


class Lost(InfraError):
    """A trajectory that its group has to do without."""


class TrajectoryLoop(AgentLoopBase):  # type: ignore[misc]
    """verl makes one for each trajectory. Limits, formats, stop reasons, sandbox and grading are the local engine's."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput | list[AgentLoopOutput]:
        """One trajectory of a row of the data (``cluster.data.SCHEMA``), graded.

        One that the infrastructure lost is recorded and gives no output: its group goes on without it, and its share
        of the batch is filled with rows that are masked out. Where groups are filtered (DAPO's dynamic sampling), verl
        takes a group that ended well for one with a reward, so there the loss is raised: the group's others are learnt
        from all the same, and a group that is lost whole is drawn anew.

        Raises:
            Lost: see above.
            Exception: whatever ends the run.
        """
        try:
            return await self._run(sampling_params, row)
        except Lost:
            raise
        except Exception as error:
            await end_run(error)
            raise

    async def _run(self, sampling_params: dict[str, Any], row: dict[str, Any]) -> AgentLoopOutput | list[Any]:
        shared = await _open(self.tokenizer)
        task, uid, validation = task_of(row), str(row["uid"]), row["extra_info"]["split"] == EVAL
        policy = ServerPolicy(self.server_manager, shared.fmt.decode, name=uid, server=self.rollout_config.name)
        step = int(row["global_steps"])
        trajectory = await run_trajectory(
            _rollout(shared, policy, sampling_params, uid),
            task,
            int(row["session_id"]),
            seed=shared.recipe.run.seed,
            step=step,
        )
        counts = await _grade(shared, trajectory, step)
        seen = shared.sandbox.stats() if isinstance(shared.sandbox, NodeSandbox) else {}
        restarts = ray.get_runtime_context().get_node_id(), seen.get("restarts", 0)
        await shared.recorder.add.remote(
            uid, int(row["index"]), trajectory, counts, validation=validation, restarts=restarts
        )
        lost = trajectory.stop_reason is StopReason.INFRA
        if lost and self.config.algorithm.filter_groups.enable and not validation:
            raise Lost(f"task {task.id}, sample {trajectory.sample}: lost to the infrastructure")
        return [] if lost or not trajectory.turns else output_of(trajectory, policy)


async def end_run(error: Exception) -> None:
    """verl takes an error of an agent loop for one bad sample and goes on. One that the local engine would end the run
    with ends it here too: the recorder tells the launcher why, and verl's runner is ended."""
    _log.error("the run ends", exc_info=error)
    kind = "user" if isinstance(error, UserError) else "infra"
    told = str(error) if isinstance(error, ReToolError) else f"{type(error).__name__}: {error}"
    try:
        await ray.get_actor(NAME).fail.remote(kind, told)
    except Exception as fault:  # the recorder is gone, or the disk is full
        _log.error("the launcher could not be told why", exc_info=fault)
    with contextlib.suppress(ValueError):  # another worker has ended it already
        ray.kill(ray.get_actor(RUNNER))


def _rollout(shared: Shared, policy: ServerPolicy, sampling_params: dict[str, Any], uid: str) -> Rollout:
    """verl says how to sample: training and validation differ."""
    recipe = shared.recipe
    config = recipe.rollout.model_copy(
        update={
            "temperature": float(sampling_params["temperature"]),
            "top_p": float(sampling_params["top_p"]),
            "top_k": max(0, int(sampling_params["top_k"])),
        }
    )
    sandbox = _Named(shared.sandbox, uid) if shared.sandbox is not None else None
    return make_rollout(recipe, policy, shared.fmt, sandbox, config)


@dataclass(frozen=True)
class _Named:
    """The node's sandbox, with a group's sessions kept apart from those of the same task drawn again."""

    sandbox: Sandbox
    uid: str

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> Any:
        return await self.sandbox.execute(code, timeout_s, session=session and f"{self.uid}/{session}")

    def release(self, session: str) -> None:
        self.sandbox.release(f"{self.uid}/{session}")

    async def close(self) -> None:
        """The node's sandbox outlives the trajectory."""


async def _grade(shared: Shared, trajectory: Trajectory, step: int) -> dict[str, float]:
    """Set its grade and reward; what became of its answer, to be counted. A step's hostile answers share a budget."""
    recipe = shared.recipe
    groups = [make_group(trajectory.task, [trajectory])]
    async with shared.grading:
        if shared.step != step:
            shared.step, shared.left_s = step, LOST_S / recipe.cluster.agent_workers
        counts = await asyncio.to_thread(judge, groups, recipe.rl, lost_s=shared.left_s)
        shared.left_s -= LIMIT_S * counts.timeouts
    punish_overlong(groups, recipe.rl.overlong, recipe.rollout.max_response_tokens)
    return counts.metrics()


def output_of(trajectory: Trajectory, policy: ServerPolicy) -> AgentLoopOutput:
    """The trajectory as verl learns from it: ids, mask and log-probabilities as they are, none made again."""
    start = len(trajectory.prompt_ids)
    versions = [turn.output.policy_version for turn in trajectory.turns]
    return AgentLoopOutput(
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.ids_T[start:],
        response_mask=trajectory.mask_T[start:],
        response_logprobs=trajectory.logprobs_T[start:],
        reward_score=trajectory.reward,
        num_turns=trajectory.num_turns,
        metrics=AgentLoopMetrics(
            generate_sequences=policy.seconds, tool_calls=trajectory.sandbox_s, num_preempted=policy.preempted
        ),
        extra_fields={
            "reward_extra_info": {"acc": float(trajectory.grade is not None and trajectory.grade.correct)},
            "min_global_steps": min(versions),
            "max_global_steps": max(policy.newest, *versions),
        },
    )
