"""The long tail: which groups are done, what is kept of the others, and that it goes on where it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

from retool.config import RolloutConfig
from retool.formats import make_format
from retool.rollout import Rollout
from retool.store import read_groups, write_trajectories
from retool.tail import PendingGroup, run_until
from retool.types import ExecutionResult, Finish, SamplingParams, StopReason, Task, TokenOutput, TrajectoryGroup
from tests.fakes import ScriptedSandbox, ok, tiny_tokenizer

FMT = make_format(RolloutConfig(), tiny_tokenizer())
CONFIG = RolloutConfig(max_turns=3, max_response_tokens=400, max_context=2000)
CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "1"}}\n</tool_call>'


def ids_of(text: str) -> list[int]:
    return [*FMT.tokenizer.encode(text, add_special_tokens=False), FMT.stop_token_ids[0]]


class SlowPolicy:
    """Says its turns one token a tick, so that it can be interrupted anywhere; a session named in ``slow`` takes
    four ticks a token. Log-probabilities tell the version that sampled them."""

    def __init__(self, says: list[str], slow: set[str], version: int = 0) -> None:
        self.turns = [ids_of(text) for text in says]
        self.slow, self.version = slow, version
        self.cut = asyncio.Event()
        self.asked: list[tuple[str, int, SamplingParams]] = []
        self.prompts: dict[str, int] = {}

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        self.asked.append((session, len(ids), params))
        text = FMT.decode(ids)
        turn = self.turns[min(text.count("</tool_response>"), len(self.turns) - 1)]
        said = text[text.rindex("assistant") + len("assistant\n") :] if "assistant" in text else ""
        left = turn[len(FMT.tokenizer.encode(said, add_special_tokens=False)) :]
        out: list[int] = []
        for token in left[: params.max_tokens]:
            for _ in range(4 if session in self.slow else 1):
                await asyncio.sleep(0)
                if self.cut.is_set():
                    return TokenOutput(out, [-1.0 - self.version] * len(out), Finish.ABORT, self.version)
            out.append(token)
        return TokenOutput(out, [-1.0 - self.version] * len(out), Finish.STOP, self.version)

    def interrupt(self) -> None:
        self.cut.set()

    def release(self, session: str) -> None:
        pass


def make_rollout(policy: SlowPolicy) -> Rollout:
    return Rollout(policy=policy, fmt=FMT, sandbox=ScriptedSandbox({"1": "1"}), config=CONFIG)


def pending(count: int, size: int = 2) -> list[PendingGroup]:
    tasks = [Task(f"t{i}", "s", [{"role": "user", "content": f"{i}?"}], "1") for i in range(count)]
    return [PendingGroup(task, 5, range(size)) for task in tasks]


def test_the_first_groups_that_are_done_are_enough_and_the_rest_is_paused() -> None:
    async def job() -> None:
        policy = SlowPolicy([CALL, "So \\boxed{1}."], slow={"5/t1/0"})
        done, rest = await run_until(make_rollout(policy), pending(3), 2, seed=0)
        assert [group.task.id for group in done] == ["t0", "t2"]
        assert all(t.stop_reason is StopReason.ANSWERED for g in done for t in g.trajectories)
        (left,) = rest
        assert left.task.id == "t1"
        assert left.trajectories[1].stop_reason is StopReason.ANSWERED
        cut = left.trajectories[0]
        assert cut.stop_reason is None
        assert cut.turns[-1].output.finish is Finish.ABORT
        assert 0 < len(cut.turns[-1].output.token_ids) < len(policy.turns[0])

    asyncio.run(job())


def test_what_was_paused_goes_on_with_its_old_tokens_and_versions(tmp_path: Path) -> None:
    """Also after a stay in a file. The whole equals what an uninterrupted attempt says; the first part keeps the old
    log-probabilities, and the turn is as old as its oldest token."""

    async def job() -> None:
        first = SlowPolicy([CALL, "So \\boxed{1}."], slow={"5/t1/0"})
        _, rest = await run_until(make_rollout(first), pending(3), 2, seed=0)
        before = rest[0].trajectories[0]
        write_trajectories(tmp_path / "x.parquet", [TrajectoryGroup(rest[0].task, list(rest[0].trajectories.values()))])
        (kept,) = read_groups(tmp_path / "x.parquet")
        again = [PendingGroup(kept.task, 5, range(2), {t.sample: t for t in kept.trajectories})]
        second = SlowPolicy([CALL, "So \\boxed{1}."], slow=set(), version=3)
        done, left = await run_until(make_rollout(second), again, 1, seed=0)
        assert left == []
        whole = done[0].trajectories[0]
        assert {session for session, _, _ in second.asked} == {"5/t1/0"}  # the other one was done already
        assert [turn.output.token_ids for turn in whole.turns] == second.turns
        cut = before.turns[-1].output
        assert whole.turns[0].output.logprobs[: len(cut.token_ids)] == cut.logprobs == [-1.0] * len(cut.token_ids)
        assert set(whole.turns[0].output.logprobs[len(cut.token_ids) :]) == {-4.0}
        assert [turn.output.policy_version for turn in whole.turns] == [0, 3]
        assert len(whole.ids_T) == len(whole.mask_T) == len(whole.logprobs_T)
        assert before.turns[-1].output.finish is Finish.ABORT, "the paused attempt itself is left as it was"

    asyncio.run(job())


def test_a_turn_goes_on_with_random_numbers_of_its_own() -> None:
    async def job() -> None:
        first = SlowPolicy(["So \\boxed{1}."], slow={"5/t0/0"})
        _, rest = await run_until(make_rollout(first), pending(2, size=1), 1, seed=0)
        sampled = len(rest[0].trajectories[0].turns[-1].output.token_ids)
        second = SlowPolicy(["So \\boxed{1}."], slow=set())
        await run_until(make_rollout(second), rest, 1, seed=0)
        seeds = [params.seed for session, _, params in first.asked + second.asked if session == "5/t0/0"]
        assert len(set(seeds)) == len(seeds) == 2
        rooms = [params.max_tokens for session, _, params in first.asked + second.asked if session == "5/t0/0"]
        assert rooms[1] == rooms[0] - sampled < rooms[0]

    asyncio.run(job())


def test_with_nothing_left_over_all_are_run_to_their_end() -> None:
    async def job() -> None:
        policy = SlowPolicy(["So \\boxed{1}."], slow=set())
        done, rest = await run_until(make_rollout(policy), pending(2), 5, seed=0)
        assert (len(done), rest) == (2, [])
        assert not policy.cut.is_set()

    asyncio.run(job())


def test_code_that_runs_is_cut_off_and_runs_again() -> None:
    """The first sandbox never answers the slow session; its turn is kept, and the next step runs its code anew."""

    async def job() -> None:
        policy = SlowPolicy([CALL, "So \\boxed{1}."], slow={"5/t1/0"})
        rollout = make_rollout(policy)
        stuck = ScriptedSandbox({"1": "1"}, held=True)
        groups = pending(2, size=1)

        async def execute(code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
            # the first to ask is the quick one
            if len(stuck.runs) == 0 and not rollout_runs:
                rollout_runs.append(code)
                return ok("1")
            return await stuck.execute(code, timeout_s, session=session)

        rollout_runs: list[str] = []
        rollout.sandbox.execute = execute  # type: ignore[union-attr, method-assign]
        policy.slow = set()
        done, rest = await run_until(rollout, groups, 1, seed=0)
        assert len(done) == len(rest) == 1
        assert stuck.cancelled == 1
        (cut,) = rest[0].trajectories.values()
        assert cut.turns[-1].output.finish is Finish.STOP
        assert (len(cut.turns[-1].calls), cut.turns[-1].executions, cut.stop_reason) == (1, [], None)
        second = SlowPolicy([CALL, "So \\boxed{1}."], slow=set(), version=1)
        (group,), _ = await run_until(make_rollout(second), rest, 1, seed=0)
        (whole,) = group.trajectories
        assert [turn.output.token_ids for turn in whole.turns] == second.turns
        assert len(second.asked) == 1, "the turn that was whole is not sampled again"
        assert whole.turns[0].executions[0] is not None
        assert [turn.output.policy_version for turn in whole.turns] == [0, 1]

    asyncio.run(job())
