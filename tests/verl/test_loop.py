"""The agent loop on a real local Ray: what verl gets of a trajectory is what the local engine makes of the same tokens,
and what is lost, refused or raised goes where verl 0.9.1 looks for it.

Real here: Ray, the recorder, the node's sandbox, the grading, verl's worker and its TransferQueue. Scripted: the
servers, which say given tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedPolicy

pytest.importorskip("verl.trainer", reason="needs the cluster environment (constraints of verl)")

import ray
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.workers.rollout.replica import TokenOutput as ServerOutput

import retool.nano
from retool.cluster import loop
from retool.cluster.data import EVAL, TRAIN, write_tasks
from retool.cluster.loop import TrajectoryLoop
from retool.cluster.main import compose
from retool.cluster.option import Job
from retool.cluster.options import overrides_of
from retool.cluster.recorder import NAME, Recorder, secret_tree
from retool.config import Recipe, make_recipe
from retool.errors import ConfigError, InfraError, SandboxBroken
from retool.formats import make_format
from retool.formats.calls import tool_call
from retool.formats.chat import ChatFormat
from retool.formats.tags import write_code
from retool.grading.grader import judge
from retool.grading.rewards import punish_overlong
from retool.rollout import Rollout, make_group, run_trajectory
from retool.sandbox import LocalSandbox
from retool.store import RunFolder, read_groups
from retool.types import ExecutionStatus, Finish, StopReason, Task, TokenOutput, Trajectory

LIMIT_S = 150.0
"""Of a scenario; each needs seconds on an idle machine."""
TOKENIZER = AutoTokenizer.from_pretrained(Path(retool.nano.__file__).parent)
END = "<|im_end|>"
VERSION = 7
"""Of the weights, as the servers tell it."""
TRAINING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
"""What verl's worker hands to a loop."""
FORMATS = ("hermes", "code_tags")
ROOM, CONTEXT = 300, 560
SANDBOX = {"workers": 4, "preload": ["math"], "retries": 0, "timeout_s": 20.0}


# --- tokens that a model might have sampled ---------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


class Speaker:
    """Says a trajectory's turns as a model would that samples just these tokens: cut at a stop string and at
    ``max_tokens``. Each token's log-probability tells its place among all that were said."""

    def __init__(self, turns: Sequence[str]) -> None:
        self._turns = [encode(turn) for turn in turns]
        self.said: list[int] = []

    def say(self, max_tokens: int, stop: Sequence[str]) -> tuple[list[int], list[float], Finish]:
        turn, piece = self._turns[0], list[int]()
        finish = Finish.LENGTH
        while turn and finish is Finish.LENGTH and len(piece) < max_tokens:
            piece.append(turn.pop(0))
            if not turn or any(word in TOKENIZER.decode(piece) for word in stop):
                finish = Finish.STOP
        if not turn:
            self._turns.pop(0)
        self.said += piece
        first = len(self.said) - len(piece) + 1
        return piece, [-(first + place) / 1000 for place in range(len(piece))], finish

    @property
    def done(self) -> bool:
        return not self._turns


class Client:
    """In place of verl's ``LLMServerClient``: a trajectory says ``script(uid, sample)``. ``before`` is awaited first,
    with the uid and the number of the request."""

    def __init__(
        self,
        script: Callable[[str, int], Sequence[str]],
        before: Callable[[str, int], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._script, self._before = script, before
        self.speakers: dict[str, Speaker] = {}
        self.asked: list[dict[str, Any]] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **more: Any
    ) -> ServerOutput:
        assert not more
        uid = request_id.partition("/")[0]
        number = sum(asked["request_id"] == request_id for asked in self.asked)
        self.asked.append({"request_id": request_id, "prompt_ids": list(prompt_ids)} | sampling_params)
        if request_id not in self.speakers:
            self.speakers[request_id] = Speaker(self._script(uid, int(request_id.rpartition("/")[2])))
        if self._before is not None:
            await self._before(uid, number)
        await asyncio.sleep(0)
        ids, logprobs, _ = self.speakers[request_id].say(sampling_params["max_tokens"], sampling_params.get("stop", ()))
        # vLLM's stop and length are both "completed" to verl.
        return ServerOutput(
            token_ids=ids, log_probs=logprobs, stop_reason="completed", extra_fields={"global_steps": VERSION}
        )


# --- a run without a trainer ------------------------------------------------------------------------------------------


def recipe_of(fmt: str = "hermes", **sections: dict[str, Any]) -> Recipe:
    rollout = {
        "format": fmt, "max_turns": 3, "max_response_tokens": ROOM, "max_context": CONTEXT,
        "max_observation_tokens": 40, "max_malformed": 1,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "rollout": rollout,
        "rl": {"reward": "verl"},
        "sandbox": SANDBOX,
        "model": {"device": "cpu"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return make_recipe(tree)


def format_of(recipe: Recipe) -> ChatFormat:
    return make_format(recipe.rollout, TOKENIZER)


def config_of(*, filter_groups: bool = False, server: str = "vllm") -> Any:
    """All of verl's configuration that a loop reads."""
    return OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": {"name": server}},
            "algorithm": {"filter_groups": {"enable": filter_groups}},
            "data": {},
        }
    )


def task_of(answer: str = "4", question: str = "What is 2 + 2?", name: str = "t/1") -> Task:
    return Task(name, "world", [{"role": "user", "content": question}], answer, {"family": "add"})


@dataclass
class Run:
    """A recorder in its run folder, and loops beside it."""

    recipe: Recipe
    folder: RunFolder
    recorder: Any

    async def go(
        self,
        client: Client,
        task: Task,
        uid: str,
        *,
        sample: int = 0,
        place: int = 0,
        split: str = TRAIN,
        config: Any = None,
        sampling: dict[str, Any] = TRAINING,
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """One trajectory, as verl's worker has it made."""
        config = config or config_of()
        path = self.folder.path / f"{uuid.uuid4().hex}.parquet"
        write_tasks(path, [task], split)
        (row,) = _read_rows(path)
        agent = TrajectoryLoop(
            DictConfigWrap(config), client, TOKENIZER, None, RLHFDataset, DictConfigWrap(config.data), "qwen2"
        )
        row |= {"uid": uid, "session_id": sample, "global_steps": 1, "index": place}
        return await agent.run(dict(sampling), **row)

    def end_step(self, step: int = 1) -> tuple[dict[str, float], list[Trajectory], list[Trajectory]]:
        """The step's metrics; its trajectories and the lost ones, as they were written."""
        metrics = ray.get(self.recorder.end_step.remote(step, {}), timeout=60)
        ray.get(self.recorder.flush.remote(), timeout=60)
        groups = read_groups(self.folder.step_trajectories(step))
        return metrics, [t for g in groups for t in g.trajectories], [t for g in groups for t in g.infra_failed]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """As verl's data set reads them."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = pq.read_table(path).to_pylist()
    return [{**row, "raw_prompt": row.pop("prompt")} for row in rows]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@contextmanager
def running(recipe: Recipe, folder: Path, *, job: str = "rl", here: str = "") -> Iterator[Run]:
    """A run, and afterwards nothing of it in this process and in Ray: the next one has another recipe."""
    run = RunFolder(folder / uuid.uuid4().hex)
    recorder = ray.remote(Recorder).options(name=NAME, num_cpus=0).remote(secret_tree(recipe), str(run.path), job, here)
    try:
        yield Run(recipe, run, recorder)
    finally:
        loop._shared.clear()
        loop._opening = asyncio.Lock()  # one that was waited for belongs to its event loop
        named = ray.util.list_named_actors(all_namespaces=True)
        pools = [actor for actor in named if actor["name"].startswith("retool_sandbox_")]
        for actor in [recorder, *(ray.get_actor(**pool) for pool in pools)]:
            ray.kill(actor)
        gone = {NAME, *(pool["name"] for pool in pools)}
        deadline = time.monotonic() + 30
        while gone & {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}:
            assert time.monotonic() < deadline, "an actor does not end"
            time.sleep(0.05)


def play(scenario: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


# --- 1. the same tokens, both ways ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is said, and what must come of it."""

    turns: tuple[str, ...]
    stop: StopReason
    num_turns: int
    correct: bool = False
    statuses: tuple[str, ...] = ()
    """Of the programs that were run."""
    question: str = "What is 2 + 2?"


def call_of(fmt: str, *codes: str) -> str:
    """A turn that calls, as it is sampled."""
    if fmt == "code_tags":
        return "\n\n".join(map(write_code, codes))
    calls = (json.dumps(tool_call(code)["function"]) for code in codes)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls) + END


def broken_of(fmt: str) -> str:
    return (
        "<code>\n```python\nprint(1)\n```\n" if fmt == "code_tags" else '<tool_call>\n{"name": \n</tool_call>'
    ) + END


def long_turn(fmt: str, code: str, tokens: int) -> str:
    """A turn with one call, of that many tokens or a few less."""
    prose = "I think.\n"
    while len(encode(prose + " so\n" + call_of(fmt, code))) <= tokens:
        prose += " so"
    return prose + "\n" + call_of(fmt, code)


def cases_of(fmt: str) -> dict[str, Case]:
    right, wrong = rf"The answer is \boxed{{4}}.{END}", rf"So it is \boxed{{5}}.{END}"
    call = call_of(fmt, "print(2 + 2)")
    tag = 'print("</code>", 2 + 2)' if fmt == "code_tags" else 'print("</tool_call>" + chr(60) + "|im_end|>", 2 + 2)'
    cases = {
        "answer without a call": Case((right,), StopReason.ANSWERED, 2, True),
        "wrong answer without a call": Case((wrong,), StopReason.ANSWERED, 2),
        "one call": Case((call, right), StopReason.ANSWERED, 4, True, ("ok",)),
        "wrong after two calls": Case((call, call, wrong), StopReason.ANSWERED, 6, False, ("ok", "ok")),
        "a program that fails": Case((call_of(fmt, "1 / 0"), right), StopReason.ANSWERED, 4, True, ("error",)),
        "malformed call": Case((broken_of(fmt), right), StopReason.ANSWERED, 4, True),
        "malformed too often": Case((broken_of(fmt), broken_of(fmt)), StopReason.MALFORMED, 4),
        "cut off": Case(("word " * 400 + right,), StopReason.MAX_TOKENS, 2),
        "cut off after a call": Case((call, "word " * 400 + right), StopReason.MAX_TOKENS, 4, False, ("ok",)),
        "observation does not fit": Case(
            (long_turn(fmt, "print('y ' * 500)", ROOM - 12),), StopReason.MAX_TOKENS, 2, False, ("ok",)
        ),
        "context full": Case(
            ("word " * 400 + right,), StopReason.CONTEXT_FULL, 2, question="What is 2 + 2?" + " so" * 180
        ),
        "max_turns": Case((call, call, call), StopReason.MAX_TURNS, 6, False, ("ok", "ok")),
        "prints the tag that ends a turn": Case(
            (call_of(fmt, tag), right), StopReason.ANSWERED, 4, True, ("ok",)
        ),
    }  # fmt: skip
    if fmt == "hermes":
        cases["two calls in one turn"] = Case(
            (call_of(fmt, "print(2)", "print(3)"), right), StopReason.ANSWERED, 4, True, ("ok", "ok")
        )
    return cases


@dataclass(frozen=True)
class Both:
    """One case's trajectory: what verl got, what was recorded, what the local engine made."""

    output: AgentLoopOutput
    recorded: Trajectory
    local: Trajectory
    said: list[int]
    requests: int


async def local_trajectory(recipe: Recipe, sandbox: LocalSandbox, task: Task, turns: Sequence[str]) -> Trajectory:
    """As ``collect`` has it made and graded."""
    speaker = Speaker(turns)

    def script(session: str, turn: int) -> TokenOutput:
        params = policy.asked[-1].params
        return TokenOutput(*speaker.say(params.max_tokens, params.stop))

    policy = ScriptedPolicy(script)
    rollout = Rollout(
        policy, format_of(recipe), sandbox, recipe.rollout, recipe.sandbox.timeout_s, recipe.sandbox.retries
    )
    trajectory = await run_trajectory(rollout, task, 0, seed=recipe.run.seed, step=1)
    groups = [make_group(task, [trajectory])]
    await asyncio.to_thread(judge, groups, recipe.rl)
    punish_overlong(groups, recipe.rl.overlong, recipe.rollout.max_response_tokens)
    return trajectory


def both_ways(fmt: str, overlong: float, folder: Path) -> dict[str, Both]:
    recipe = recipe_of(fmt, rl={"reward": "verl", "overlong": {"buffer_share": overlong}})
    cases = cases_of(fmt)
    tasks = {name: task_of(question=case.question, name=name) for name, case in cases.items()}
    client = Client(lambda uid, sample: cases[uid].turns)

    async def cluster_side() -> list[Any]:
        calls = (run.go(client, tasks[name], name, place=place) for place, name in enumerate(cases))
        return await asyncio.gather(*calls)

    async def local_side() -> list[Trajectory]:
        sandbox = LocalSandbox(recipe.sandbox)
        await sandbox.start()
        try:
            return [await local_trajectory(recipe, sandbox, tasks[name], case.turns) for name, case in cases.items()]
        finally:
            await sandbox.close()

    with running(recipe, folder) as run:
        outputs = play(cluster_side())
        metrics, recorded, lost = run.end_step()
    assert lost == [] and metrics["infra/trajectories"] == 0
    assert [t.task.id for t in recorded] == list(cases)
    said = {request.partition("/")[0]: speaker.said for request, speaker in client.speakers.items()}
    requests = Counter(asked["request_id"].partition("/")[0] for asked in client.asked)
    rows = zip(cases, outputs, recorded, play(local_side()), strict=True)
    return {name: Both(output, record, local, said[name], requests[name]) for name, output, record, local in rows}


@pytest.fixture(scope="module")
def made(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], dict[str, Both]]:
    """All cases of a format and a punishment, made once."""
    known: dict[tuple[str, float], dict[str, Both]] = {}

    def make(fmt: str, overlong: float) -> dict[str, Both]:
        if (fmt, overlong) not in known:
            known[fmt, overlong] = both_ways(fmt, overlong, tmp_path_factory.mktemp("both"))
        return known[fmt, overlong]

    return make


@pytest.mark.parametrize("overlong", [0.0, 0.5])
@pytest.mark.parametrize(("fmt", "name"), [(fmt, name) for fmt in FORMATS for name in cases_of(fmt)])
def test_verl_gets_what_the_local_engine_makes(made: Any, fmt: str, name: str, overlong: float) -> None:
    both, case = made(fmt, overlong)[name], cases_of(fmt)[name]
    local, recorded = both.local, both.recorded
    # the scenario is what it says
    assert (local.stop_reason, local.num_turns) == (case.stop, case.num_turns)
    assert local.grade is not None and local.grade.correct == case.correct
    ran = [result.status for turn in local.turns for result in turn.executions if result is not None]
    assert ran == [ExecutionStatus(status) for status in case.statuses]

    # what verl learns from
    start = len(local.prompt_ids)
    tensors = both.output.as_dict()
    assert tensors["prompts"].tolist() == local.prompt_ids
    assert tensors["responses"].tolist() == local.ids_T[start:]
    assert tensors["response_mask"].tolist() == local.mask_T[start:]
    assert torch.equal(tensors["rollout_log_probs"], torch.tensor(local.logprobs_T[start:]))
    rewards = torch.zeros(len(local.ids_T) - start)
    rewards[-1] = local.reward
    assert torch.equal(tensors["rm_scores"], rewards)
    assert tensors["num_turns"] == local.num_turns
    extra = tensors["extra_fields"]
    assert extra["reward_extra_info"] == {"acc": float(case.correct)}
    assert (extra["min_global_steps"], extra["max_global_steps"]) == (VERSION, VERSION)

    # the mask says what was sampled, and nothing else has a log-probability
    mask = tensors["response_mask"].bool()
    assert tensors["responses"][mask].tolist() == both.said
    assert int(mask.sum()) == len(both.said) == local.sampled_length
    assert (tensors["rollout_log_probs"][~mask] == 0.0).all() and (tensors["rollout_log_probs"][mask] < 0.0).all()

    # what is recorded
    for field in ("task", "prompt_ids", "ids_T", "mask_T", "stop_reason", "num_turns", "grade", "reward"):
        assert getattr(recorded, field) == getattr(local, field), field
    assert torch.equal(torch.tensor(recorded.logprobs_T), torch.tensor(local.logprobs_T))  # the file has float32
    assert [turn.text for turn in recorded.turns] == [turn.text for turn in local.turns]


def test_a_turn_that_the_server_ends_too_early_is_asked_for_again(made: Any) -> None:
    """At a ``</code>`` that the program prints, the turn is not over."""
    requests = {fmt: made(fmt, 0.0)["prints the tag that ends a turn"].requests for fmt in FORMATS}
    assert requests == {"hermes": 2, "code_tags": 3}


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_rewards_are_those_of_the_recipe(made: Any, fmt: str) -> None:
    """Numbers by hand: verl's reward, and the punishment of the last half of the room."""
    plain, punished = made(fmt, 0.0), made(fmt, 0.5)
    worth = {name: both.output.reward_score for name, both in plain.items()}
    assert worth["one call"] == 1.0 and worth["wrong answer without a call"] == -1.0
    assert worth["wrong after two calls"] == pytest.approx(-0.8) and worth["max_turns"] == pytest.approx(-0.8)
    for name, both in punished.items():
        over = max(0, len(both.output.response_ids) - ROOM // 2)
        assert both.output.reward_score == pytest.approx(worth[name] - over / (ROOM // 2)), name
    assert punished["cut off"].output.reward_score == pytest.approx(-2.0)


# --- 2. how it is sampled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_the_server_is_asked(cluster: None, tmp_path: Path, fmt: str, tools: bool, server: str) -> None:
    """verl's own sampling parameters, whatever the recipe's are; the room left; stop strings for tools alone."""
    recipe = recipe_of(fmt, rollout={"tools": tools, "temperature": 0.3, "top_p": 0.4, "top_k": 5})
    turns = (call_of(fmt, "print(2 + 2)"), rf"\boxed{{4}}.{END}") if tools else (rf"\boxed{{4}}.{END}",)
    client = Client(lambda uid, sample: turns)
    validation = {"temperature": 0.6, "top_p": 0.7, "top_k": 20, "repetition_penalty": 1.0, "logprobs": False}
    greedy = {"temperature": 0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": False}
    config = config_of(server=server)

    async def scenario() -> list[Any]:
        where = {"config": config}
        return [
            await run.go(client, task_of(), "a", sampling=TRAINING, **where),
            await run.go(client, task_of(), "b", split=EVAL, sampling=validation, **where),
            await run.go(client, task_of(), "c", split=EVAL, sampling=greedy, **where),
        ]

    with running(recipe, tmp_path) as run:
        outputs = play(scenario())
    fmt_ = format_of(recipe)
    keep = {"vllm": "include_stop_str_in_output", "sglang": "no_stop_trim"}[server]
    for uid, sampling, output in zip("abc", (TRAINING, validation, greedy), outputs, strict=True):
        asked = [a for a in client.asked if a["request_id"] == f"{uid}/1/t/1/0"]
        assert len(asked) == len(turns)
        for request in asked:
            assert {k: request[k] for k in ("temperature", "top_p", "top_k")} == {
                k: sampling[k] for k in ("temperature", "top_p", "top_k")
            }
            assert request["logprobs"] is True and request["repetition_penalty"] == 1.0
            assert request["stop_token_ids"] == list(fmt_.stop_token_ids)
            so_far = len(request["prompt_ids"]) - len(output.prompt_ids)
            assert request["max_tokens"] == ROOM - so_far
            stops = bool(tools and fmt_.stop)
            assert request.get("stop", []) == (list(fmt_.stop) if stops else [])
            assert request.get(keep, False) is stops
        ids = output.prompt_ids + output.response_ids
        assert all(request["prompt_ids"] == ids[: len(request["prompt_ids"])] for request in asked)


# --- 3. lost to the infrastructure ------------------------------------------------------------------------------------


@contextmanager
def service() -> Iterator[tuple[str, Callable[[], None]]]:
    """An address where a sandbox answers, and what makes it stop listening."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'"pong"')

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}", stop
    finally:
        if thread.is_alive():
            stop()


RIGHT = rf"\boxed{{4}}.{END}"
LOST = (call_of("hermes", "print(4)"), RIGHT)


async def close_sandbox() -> None:
    await loop._shared[0].sandbox.close()  # type: ignore[union-attr]


def test_a_trajectory_that_is_lost(cluster: None, tmp_path: Path) -> None:
    """No output, counted and written; raised where groups are filtered, but not in a validation."""
    client = Client(lambda uid, sample: (RIGHT,) if uid.startswith("fine") else LOST)
    with service() as (url, stop), running(recipe_of(sandbox={"url": url}), tmp_path) as run:

        async def scenario() -> None:
            assert isinstance(await run.go(client, task_of(), "fine"), AgentLoopOutput)
            stop()
            assert await run.go(client, task_of(), "lost", place=1) == []
            filtering = config_of(filter_groups=True)
            with pytest.raises(InfraError, match=r"task t/1, sample 3: lost to the infrastructure"):
                await run.go(client, task_of(), "raised", sample=3, place=2, config=filtering)
            assert await run.go(client, task_of(), "validated", split=EVAL, config=filtering) == []
            assert await run.go(client, task_of(), "validated", split=EVAL, sample=1) == []
            assert isinstance(await run.go(client, task_of(), "fine too", split=EVAL), AgentLoopOutput)
            await close_sandbox()

        play(scenario())
        metrics, kept, lost = run.end_step()
        assert metrics["infra/trajectories"] == 2
        assert [t.sample for t in kept] == [0] and [t.sample for t in lost] == [0, 3]
        assert {t.stop_reason for t in lost} == {StopReason.INFRA} and all(t.grade is None for t in lost)
        validated = ray.get(run.recorder.end_validation.remote(1), timeout=60)
        assert validated["val-aux/infra/trajectories"] == 2


def test_a_service_that_never_answered_is_told(cluster: None, tmp_path: Path) -> None:
    """Nothing is recorded: the sandbox was never opened. Whoever comes next tries again."""
    client = Client(lambda uid, sample: LOST)
    with service() as (url, stop), running(recipe_of(sandbox={"url": url}), tmp_path) as run:

        async def scenario() -> None:
            stop()
            for uid in ("a", "b"):
                with pytest.raises(SandboxBroken, match=r"sandbox\.url"):
                    await run.go(client, task_of(), uid)
            assert client.asked == []

        play(scenario())


# --- through verl's own worker and TransferQueue ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def queue(cluster: None) -> Iterator[Any]:
    import transfer_queue as tq

    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield tq
    tq.close()


def composed(recipe: Recipe, *extra: str) -> Any:
    return compose(overrides_of(Job("rl", recipe, Path("/runs/x")), extra))


def worker_of(config: Any, client: Client) -> Any:
    """verl's worker, in this process."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    return AgentLoopWorkerTQ.__ray_metadata__.modified_class(config, client)


def batch_of(config: Any, folder: Path, tasks: list[Task], uids: list[str], *, validate: bool) -> Any:
    """The tasks as verl's trainer hands them to a worker."""
    import numpy as np
    from verl.utils import tensordict_utils as tu

    path = folder / f"{uuid.uuid4().hex}.parquet"
    write_tasks(path, tasks, EVAL if validate else TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        data = RLHFDataset(str(path), TOKENIZER, config.data)
    rows = collate_fn([data[place] for place in range(len(tasks))])
    rows["uid"] = np.array(uids, dtype=object)
    batch = tu.get_tensordict(rows)
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    return batch


async def settled(worker: Any, batch: Any) -> None:
    await worker.generate_sequences(batch)
    await asyncio.gather(*worker.background_tasks)


def in_queue(queue: Any, partition: str, uids: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The groups' states, and the tags of their trajectories by key."""
    found = (queue.kv_list(partition) or {}).get(partition, {})
    ours = {key: tag for key, tag in found.items() if key.partition("_")[0] in uids}
    return [ours.pop(uid)["status"] for uid in uids], ours


@pytest.mark.parametrize("filters", [False, True])
def test_verls_worker_and_lost_trajectories(cluster: None, queue: Any, tmp_path: Path, filters: bool) -> None:
    """A group whose sample 1 is lost, one that is lost whole, one that is fine: the others' rows are there, a lost one
    leaves none, and where groups are filtered its group is a failure."""
    uids = [uuid.uuid4().hex for _ in range(3)]
    turns = {uids[0]: lambda sample: LOST if sample == 1 else (RIGHT,), uids[1]: lambda sample: LOST}
    client = Client(lambda uid, sample: turns.get(uid, lambda sample: (RIGHT,))(sample))
    tasks = [task_of(name=f"t/{place}") for place in range(3)]
    rl = {"dynamic_sampling": {"enabled": filters}, "group_size": 3, "reward": "paper"}
    with service() as (url, stop), running(recipe_of(sandbox={"url": url}, rl=rl), tmp_path) as run:
        config = composed(run.recipe)

        async def scenario() -> None:
            await loop._open(TOKENIZER)
            stop()
            worker = worker_of(config, client)
            await settled(worker, batch_of(config, tmp_path, tasks, uids, validate=False))
            await close_sandbox()

        play(scenario())
        states, rows = in_queue(queue, "train", uids)
        bad = "failure" if filters else "finished"
        assert states == [bad, bad, "finished"]
        assert sorted(rows) == sorted(
            [f"{uids[0]}_{i}_0" for i in (0, 2)] + [f"{uids[2]}_{i}_0" for i in range(3)]
        )  # fmt: skip
        metrics, kept, lost = run.end_step()
        assert metrics["infra/trajectories"] == 4 and len(kept) == 5 and len(lost) == 4
        for key, tag in rows.items():
            assert tag["status"] == "success" and tag["min_global_steps"] == tag["max_global_steps"] == VERSION
            data = queue.kv_batch_get(keys=[key], partition_id="train")
            (recorded,) = [t for t in kept if f"{uids[int(t.task.id[-1])]}_{t.sample}_0" == key]
            assert data["input_ids"][0].tolist() == recorded.ids_T
            assert data["responses"][0].tolist() == recorded.ids_T[len(recorded.prompt_ids) :]
            assert float(data["rm_scores"][0].sum()) == recorded.reward == 1.0
            assert (data["loss_mask"][0] == data["response_mask"][0]).all()
        queue.kv_clear(keys=[*uids, *rows], partition_id="train")


class Refilled(Exception):
    """verl draws new tasks in the place of lost ones."""


def buffer_of(config: Any) -> Any:
    """verl's replay buffer, as its synchronous trainer makes it of the configuration."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    def refill(number: int) -> None:
        raise Refilled(number)

    sampler, filters = config.trainer.v1.sampler, config.algorithm.filter_groups
    return ReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=sampler.max_off_policy_threshold,
        max_off_policy_strategy=sampler.max_off_policy_strategy,
        sampler_kwargs=sampler.sampler_kwargs,
        refill_fn=refill,
        filter_groups_metric=filters.metric if filters.enable else None,
        train_batch_size=config.data.train_batch_size,
        gen_batch_size=1,
        sync_refill_failed_groups=sampler.sync_refill_failed_groups,
    )


@pytest.mark.parametrize("filters", [False, True])
def test_what_verl_does_about_a_group_that_is_lost_whole(
    cluster: None, queue: Any, tmp_path: Path, filters: bool
) -> None:
    """Without filtering the step goes on with the others; with it, the group is drawn anew."""
    uids = [uuid.uuid4().hex for _ in range(2)]
    wrong = rf"\boxed{{5}}.{END}"
    client = Client(lambda uid, sample: LOST if uid == uids[1] else (wrong if sample else RIGHT,))
    rl = {"dynamic_sampling": {"enabled": filters}, "group_size": 2, "prompts": 2}
    with (
        service() as (url, stop),
        running(recipe_of(sandbox={"url": url}, rl=rl, cluster={"gpus_per_node": 2}), tmp_path) as run,
    ):
        config = composed(run.recipe)

        async def scenario() -> None:
            await loop._open(TOKENIZER)
            stop()
            tags = [{"is_prompt": True, "status": "pending", "global_steps": 1}] * 2
            await queue.async_kv_batch_put(keys=uids, partition_id="train", tags=tags)
            tasks = [task_of(name="t/0"), task_of(name="t/1")]
            await settled(worker_of(config, client), batch_of(config, tmp_path, tasks, uids, validate=False))
            await close_sandbox()

        play(scenario())
        keys, drawn = list[str](), 0
        try:
            batch, _ = buffer_of(config).sample(1, "train", 2)
            keys = sorted(batch.keys)
        except Refilled as refilled:
            (drawn,) = refilled.args
        queue.kv_clear(keys=[f"{uids[0]}_0_0", f"{uids[0]}_1_0", *(uids if drawn else ())], partition_id="train")
        assert (drawn, keys) == ((1, []) if filters else (0, [f"{uids[0]}_0_0", f"{uids[0]}_1_0"]))


def test_verls_worker_and_its_sampling_parameters(cluster: None, queue: Any, tmp_path: Path) -> None:
    """The recipe's own, by way of verl's configuration; the validation's are those of ``eval``."""
    recipe = recipe_of(
        rollout={"tools": False, "temperature": 0.9, "top_p": 0.8},
        rl={"group_size": 2},
        eval={"k": 2, "temperature": 0.6, "top_p": 0.7},
    )
    train, validated = uuid.uuid4().hex, uuid.uuid4().hex
    client = Client(lambda uid, sample: (RIGHT,))
    config = composed(recipe)

    async def scenario() -> None:
        worker = worker_of(config, client)
        await settled(worker, batch_of(config, tmp_path, [task_of()], [train], validate=False))
        await settled(worker, batch_of(config, tmp_path, [task_of()], [validated], validate=True))

    with running(recipe, tmp_path) as run:
        play(scenario())
        for partition, uid in (("train", train), ("val", validated)):
            states, rows = in_queue(queue, partition, [uid])
            assert states == ["finished"] and sorted(rows) == [f"{uid}_0_0", f"{uid}_1_0"]
            queue.kv_clear(keys=[uid, *rows], partition_id=partition)
        _, kept, _ = run.end_step()
        assert len(kept) == 2
        assert ray.get(run.recorder.end_validation.remote(1), timeout=60)["val-aux/infra/trajectories"] == 0
    by_uid = {uid: {(a["temperature"], a["top_p"], a["top_k"]) for a in client.asked if a["request_id"].startswith(uid)}
              for uid in (train, validated)}  # fmt: skip
    assert by_uid == {train: {(0.9, 0.8, -1)}, validated: {(0.6, 0.7, -1)}}


def test_a_validation_keeps_the_recipes_top_k() -> None:
    """As ``evaluate.sample`` does, which changes temperature and top-p alone."""
    config = composed(recipe_of(rollout={"top_k": 20}))
    assert config.actor_rollout_ref.rollout.top_k == 20
    assert config.actor_rollout_ref.rollout.val_kwargs.top_k == 20


def test_a_turn_that_was_resumed_is_as_old_as_its_first_token(cluster: None, tmp_path: Path) -> None:
    """verl's client of an asynchronous trainer goes on with a turn under newer weights, and says under which."""

    class Resuming(Client):
        async def generate(self, request_id: str, **asked: Any) -> ServerOutput:
            output = await super().generate(request_id, **asked)
            output.extra_fields = {"global_steps": 9, "min_global_steps": 7, "max_global_steps": 9}
            return output

    with running(recipe_of(rollout={"tools": False}), tmp_path) as run:
        output = play(run.go(Resuming(lambda uid, sample: (RIGHT,)), task_of(), "u"))
    extra = output.as_dict()["extra_fields"]
    assert (extra["min_global_steps"], extra["max_global_steps"]) == (7, 9)


# --- 4. sessions ------------------------------------------------------------------------------------------------------


def test_two_groups_of_one_task_share_no_interpreter(cluster: None, tmp_path: Path) -> None:
    """Task and sample are the same, and both live at once; a session ends with its trajectory."""
    done = asyncio.Event()
    set_x, show_x = call_of("hermes", "x = 5"), call_of("hermes", "print(globals().get('x'))")
    turns = {"one": (set_x, show_x, RIGHT), "two": (show_x, RIGHT)}

    async def before(uid: str, number: int) -> None:
        if (uid, number) == ("one", 1):
            started.set()
            await done.wait()

    client = Client(lambda uid, sample: turns[uid], before)
    started = asyncio.Event()

    async def scenario() -> None:
        one = asyncio.create_task(run.go(client, task_of(), "one"))
        await started.wait()
        await run.go(client, task_of(), "two", place=1)
        done.set()
        await one
        client.speakers.clear()
        turns["one"] = (show_x, RIGHT)
        await run.go(client, task_of(), "one", place=0)

    with running(recipe_of(sandbox={"stateful": True}), tmp_path) as run:
        play(scenario())
        _, kept, _ = run.end_step()
    printed = [[r.stdout for turn in t.turns for r in turn.executions if r is not None] for t in kept]
    assert sorted(printed) == sorted([["", "5\n"], ["None\n"], ["None\n"]])


# --- 5. a reward of the user's own ------------------------------------------------------------------------------------

_names = count()


def reward_module(folder: Path, body: str) -> str:
    """A module of a name that no other test has imported."""
    name = f"rewards_of_test_loop_{next(_names)}"
    (folder / f"{name}.py").write_text(f"def worth(trajectory):\n    {body}\n")
    return f"{name}:worth"


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_reward_beside_the_command(cluster: None, tmp_path: Path, own_path: None) -> None:
    """The worker's working folder is another one; the recorder tells where the command was typed."""
    reward = reward_module(tmp_path, "return 0.25 + trajectory.num_calls")
    client = Client(lambda uid, sample: (RIGHT,))
    recipe = recipe_of(rl={"reward": reward}, rollout={"tools": False})
    with running(recipe, tmp_path, here=str(tmp_path)) as run:
        output = play(run.go(client, task_of(), "u"))
    assert output.reward_score == 0.25


def test_a_reward_that_is_not_found(cluster: None, tmp_path: Path, own_path: None) -> None:
    reward = reward_module(tmp_path, "return 1.0")
    client = Client(lambda uid, sample: (RIGHT,))
    with (
        running(recipe_of(rl={"reward": reward}, rollout={"tools": False}), tmp_path) as run,
        pytest.raises(ConfigError, match=r"rl.reward = .*cannot be imported"),
    ):
        play(run.go(client, task_of(), "u"))


def test_a_reward_that_raises_ends_the_run(cluster: None, queue: Any, tmp_path: Path, own_path: None) -> None:
    """As on the local engine. To verl it would be a failed group and no more; the launcher is told why."""
    reward = reward_module(tmp_path, "return 1.0 / trajectory.sample")
    uid = uuid.uuid4().hex
    client = Client(lambda uid, sample: (RIGHT,))
    recipe = recipe_of(rl={"reward": reward, "group_size": 2}, rollout={"tools": False})
    config = composed(recipe)

    async def scenario() -> None:
        await settled(worker_of(config, client), batch_of(config, tmp_path, [task_of()], [uid], validate=False))

    with running(recipe, tmp_path, here=str(tmp_path)) as run:
        play(scenario())
        states, rows = in_queue(queue, "train", [uid])
        assert (states, sorted(rows)) == (["failure"], [f"{uid}_1_0"])
        metrics, kept, lost = run.end_step()
        assert ([t.sample for t in kept], lost, metrics["infra/trajectories"]) == ([1], [], 0)
        queue.kv_clear(keys=[uid, *rows], partition_id="train")
        (told,) = tmp_path.rglob("error.json")
        assert json.loads(told.read_text()) == {"kind": "infra", "message": "ZeroDivisionError: float division by zero"}


# --- 6. many at once --------------------------------------------------------------------------------------------------


def test_many_are_graded_at_once(cluster: None, tmp_path: Path) -> None:
    """Answers that only mathematics can judge, half of them wrong, one that never ends: none waits for ever."""
    number = 64

    def answer(place: int) -> str:
        if place == number - 1:
            return rf"\boxed{{(1+\sqrt{{2}}+\sqrt{{3}})^{{99999}}}}.{END}"
        over = place + 2 if place % 2 else place + 3
        return rf"\boxed{{\frac{{{2 * over}}}{{{2 * (place + 3)}}} + \sqrt{{8}}}}.{END}"

    def truth(place: int) -> Task:
        return task_of(rf"\frac{{{place + 3}}}{{{place + 3}}}+2\sqrt{{2}}", name=f"t/{place}")

    client = Client(lambda uid, sample: (answer(int(uid)),))
    with running(recipe_of(rollout={"tools": False}, rl={"reward": "paper"}), tmp_path) as run:

        async def scenario() -> tuple[list[Any], float]:
            started = time.monotonic()
            calls = (run.go(client, truth(place), str(place), place=place) for place in range(number))
            return await asyncio.gather(*calls), time.monotonic() - started

        outputs, seconds = play(scenario())
        metrics, kept, _ = run.end_step()
    print(f"{number} trajectories graded in {seconds:.1f} s")
    assert [output.reward_score for output in outputs] == [
        1.0 if place % 2 == 0 and place != number - 1 else -1.0 for place in range(number)
    ]
    assert [t.reward for t in kept] == [output.reward_score for output in outputs]
    assert (metrics["grading/hard"], metrics["grading/timeouts"]) == (number, 1)
    assert seconds < 60
