"""The node's sandbox on a real local Ray: what its users see when all is well, and when its process dies."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

import pytest
from fakes import ScriptedPolicy, tiny_tokenizer

pytest.importorskip("ray", reason="needs the cluster environment (constraints of verl)")

import ray

from retool.cluster.sandbox import NodePool, NodeSandbox, Patience, Station, open_node_sandbox
from retool.config import RolloutConfig, SandboxConfig
from retool.errors import SandboxBroken, SandboxRefused
from retool.formats.hermes import HermesFormat
from retool.rollout import Rollout, run_trajectory
from retool.types import ExecutionResult, ExecutionStatus, StopReason, Task

T = TypeVar("T")
LIMIT_S = 90.0  # of a test; each needs seconds
CONFIG = SandboxConfig(workers=8, preload=["math"])
SLEEP = "import time; time.sleep({:g})"
WHO = "import os; print(os.environ['RETOOL_SANDBOX'])"
OK, ERROR, TIMEOUT, INFRA = (ExecutionStatus(name) for name in ("ok", "error", "timeout", "infra"))


def _actor() -> Any:
    context = ray.get_runtime_context()
    name, namespace = f"retool_sandbox_{context.get_node_id()}", f"retool-{context.get_job_id()}"
    return ray.get_actor(name, namespace=namespace)


def _inside(look: Callable[[Any], Any]) -> Any:
    """What ``look`` sees in the actor's process, by Ray's own door."""
    return ray.get(_actor().__ray_call__.remote(look), timeout=20)


def _pid() -> Any:
    return _inside(lambda pool: os.getpid())


def _pools() -> list[str]:
    """Names of the actors that live."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("retool_sandbox_")]


async def _run(*counts: int) -> None:
    await _until(lambda: _inside(lambda pool: (pool._pool.running, pool._pool.waiting)) == (*counts, 0)[:2])


class Traces(NamedTuple):  # what a pool leaves where it was not tidied up
    mark: str
    folder: str


def _traces() -> Traces:
    return Traces(*_inside(lambda pool: (pool._pool._link._mark, pool._pool._link._root)))


def _left(pool: Traces) -> list[str]:
    """Processes, control groups and the folder of this pool, as far as they are there."""
    found = [pool.folder] if os.path.exists(pool.folder) else []
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                if f"RETOOL_SANDBOX={pool.mark}".encode() in file.read():
                    found.append(path)
        except OSError:
            continue
    name = f"retool-{pool.mark[:12]}"
    return found + [place for place, inner, _ in os.walk("/sys/fs/cgroup") if name in inner]


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def play(cluster: None) -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Run a scenario within ``LIMIT_S``; the next test finds no actor."""
    yield lambda scenario: asyncio.run(asyncio.wait_for(scenario, LIMIT_S))
    if ray.is_initialized():
        for _ in _pools():
            ray.kill(_actor())
        asyncio.run(_until(lambda: not _pools()))


@ray.remote(num_cpus=0)
class Worker:
    """Another process of the node, as verl's agent-loop workers are."""

    async def execute(self, code: str, session: str = "") -> ExecutionResult:
        return await NodeSandbox(CONFIG).execute(code, 20, session=session)

    async def stats(self) -> dict[str, int]:
        return NodeSandbox(CONFIG).stats()


def test_every_ending_passes_through_unchanged(play: Any) -> None:
    async def scenario() -> None:
        sandbox = await open_node_sandbox(CONFIG)
        fine = await sandbox.execute("print(6 * 7)", 20)
        assert (fine.status, fine.stdout, fine.exit_code) == (OK, "42\n", 0)
        wrong = await sandbox.execute("1 / 0", 20)
        assert (wrong.status, wrong.exit_code) == (ERROR, 1)
        assert wrong.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
        late = await sandbox.execute("print('so far', flush=True)\n" + SLEEP.format(60), 0.5)
        assert (late.status, late.stdout) == (TIMEOUT, "so far\n")
        killed = await sandbox.execute("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 20)
        assert (killed.status, killed.exit_code) == (ExecutionStatus.KILLED, -signal.SIGSEGV)
        full = await sandbox.execute("print('x' * 10**6)", 20)
        assert (full.status, len(full.stdout)) == (ExecutionStatus.OUTPUT_LIMIT, 64 << 10)
        assert (await sandbox.execute("print('\ud800')", 20)).status is ERROR  # a lone surrogate travels
        with pytest.raises(ValueError, match="timeout_s"):
            await sandbox.execute("", float("inf"))
        assert isinstance(sandbox, NodeSandbox)
        counted = sandbox.stats()
        assert (counted["calls"], counted["infra"], counted["restarts"], counted["kills"]) == (6, 0, 0, 0)
        await sandbox.close()
        with pytest.raises(RuntimeError, match="closed"):
            await sandbox.execute("", 1)

    play(scenario())


def test_all_processes_of_a_node_share_one_actor_and_one_pool(play: Any) -> None:
    async def scenario() -> None:
        workers = [Worker.remote(), Worker.remote()]
        # All at once: each would make the actor.
        marks = await asyncio.gather(NodeSandbox(CONFIG).execute(WHO, 20), *(w.execute.remote(WHO) for w in workers))
        assert {(m.status, m.stdout) for m in marks} == {(OK, marks[0].stdout)}
        assert len(_pools()) == 1
        with pytest.raises(SandboxRefused, match="other settings"):
            await open_node_sandbox(SandboxConfig(workers=3, preload=["math"]))
        for worker in workers:
            ray.kill(worker)  # one that lives makes the next test's pool

    play(scenario())


def test_sessions_keep_their_state(play: Any) -> None:
    async def scenario() -> None:
        one, two = NodeSandbox(CONFIG), NodeSandbox(CONFIG)
        assert (await one.execute("x = 1", 20, session="bc")).status is OK
        assert (await two.execute("x = 2", 20, session="c")).status is OK
        assert (await one.execute("print(x)", 20, session="bc")).stdout == "1\n"
        assert (await two.execute("print(x)", 20, session="c")).stdout == "2\n"
        assert (await one.execute("print(x)", 20)).status is ERROR
        one.release("bc")
        one.release("never seen")
        assert (await one.execute("print(x)", 20, session="bc")).status is ERROR
        assert (await two.execute("print(x)", 20, session="c")).stdout == "2\n"
        await two.close()
        assert (await one.execute("print('on')", 20, session="bc")).stdout == "on\n"

    play(scenario())


def test_a_killed_process_makes_infra_of_its_calls_and_of_nothing_else(play: Any) -> None:
    async def scenario() -> None:
        sandbox = NodeSandbox(CONFIG)
        assert (await sandbox.execute("print(1)", 20)).status is OK
        pool = _traces()
        assert (await sandbox.execute("x = 1", 20, session="s")).status is OK
        running = [asyncio.create_task(sandbox.execute(SLEEP.format(60), 60)) for _ in range(6)]
        await _run(6)
        os.kill(_pid(), signal.SIGKILL)
        results = await asyncio.gather(*running)
        assert [r.status for r in results] == [INFRA] * 6
        assert all(r.stderr and "\n" not in r.stderr for r in results)
        again = await asyncio.wait_for(sandbox.execute("print(1)", 20), 5)  # they came back to an actor that answers
        assert again.status is OK
        await _until(lambda: _left(pool) == [])
        for _ in range(2):
            assert (await sandbox.execute("x = 2", 20, session="s")).status is INFRA  # not another program
        sandbox.release("s")
        assert (await sandbox.execute("print('x' in globals())", 20, session="s")).stdout == "False\n"
        counted = sandbox.stats()
        assert (counted["restarts"], counted["infra"], counted["kills"]) == (1, 8, 0)

    play(scenario())


def test_a_rollout_whose_sandbox_is_killed_ends_as_if_nothing_had_been(play: Any) -> None:
    fmt = HermesFormat(tiny_tokenizer())
    code = SLEEP.format(3) + "; print(2 + 2)"
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    texts = [f"<tool_call>\n{call}\n</tool_call>", r"It is \boxed{4}."]
    policy = ScriptedPolicy(
        lambda session, turn: fmt.tokenizer.encode(texts[turn] + "<|im_end|>", add_special_tokens=False)
    )

    async def scenario() -> None:
        sandbox = NodeSandbox(CONFIG)
        await sandbox.start()
        rollout = Rollout(policy, fmt, sandbox, RolloutConfig(max_response_tokens=5000, max_context=9000), 20.0, 2)
        task = Task("t", "s", [{"role": "user", "content": "What is 2 + 2?"}], "4")
        playing = asyncio.create_task(run_trajectory(rollout, task, 0, seed=1, step=1))
        await _run(1)
        os.kill(_pid(), signal.SIGKILL)
        trajectory = await playing
        assert trajectory.stop_reason is StopReason.ANSWERED
        (result,) = trajectory.turns[0].executions
        assert result is not None
        assert (result.status, result.stdout) == (OK, "4\n")
        assert trajectory.turns[1].text == texts[1]
        assert sandbox.stats()["infra"] == 1

    play(scenario())


def test_cancelling_and_closing_kill_the_runs(play: Any) -> None:
    async def scenario() -> None:
        sandbox, other = NodeSandbox(CONFIG), NodeSandbox(CONFIG)
        await sandbox.start()
        # More than there are workers: some of them wait in line.
        running = [asyncio.create_task(sandbox.execute(SLEEP.format(60), 60)) for _ in range(20)]
        await _run(8, 12)
        for task in running:
            task.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended)
        await _run(0)
        at_once = [asyncio.create_task(sandbox.execute(SLEEP.format(60), 60)) for _ in range(50)]
        for pause in range(50):  # before, while and after each is sent
            await asyncio.sleep(0.001 * (pause % 3))
            at_once[pause].cancel()
        await asyncio.gather(*at_once, return_exceptions=True)
        await _run(0)
        mine = asyncio.create_task(sandbox.execute(SLEEP.format(60), 60))
        others = asyncio.create_task(other.execute(SLEEP.format(1), 60))
        await _run(2)
        await sandbox.close()
        assert (await mine).status is INFRA
        assert (await others).status is OK
        assert other.stats()["restarts"] == 0

    play(scenario())


@pytest.mark.parametrize(
    "hang",
    [lambda: _actor().__ray_call__.remote(lambda pool: time.sleep(600)), lambda: os.kill(_pid(), signal.SIGSTOP)],
    ids=["blocked", "stopped"],
)
def test_an_event_loop_that_hangs_is_found_and_restarted(play: Any, hang: Callable[[], Any]) -> None:
    async def scenario() -> None:
        station = Station(CONFIG, Patience(ping_s=0.2, answer_s=0.5))
        sandbox = NodeSandbox(CONFIG, station=station)
        assert (await sandbox.execute("print(1)", 20)).status is OK
        pool = _traces()
        hang()
        assert (await sandbox.execute("print(1)", 20)).status is INFRA  # it waits for a restart that it did not ask for
        assert (await sandbox.execute("print(1)", 20)).stdout == "1\n"
        assert (station.counts["kills"], station.counts["restarts"]) == (1, 1)
        await _until(lambda: _left(pool) == [])

    play(scenario())


def test_neither_a_full_pool_nor_a_busy_client_makes_it_look_dead(play: Any) -> None:
    async def scenario() -> None:
        station = Station(CONFIG, Patience(ping_s=0.1, answer_s=1.0))
        sandbox = NodeSandbox(CONFIG, station=station)
        await sandbox.start()
        burn = [
            sandbox.execute("import time\nt = time.time()\nwhile time.time() < t + 0.5: pass", 60) for _ in range(60)
        ]
        calls = asyncio.gather(*burn)
        await asyncio.sleep(0.3)
        for _ in range(4):
            time.sleep(1.2)  # this process's own event loop stands
            await asyncio.sleep(0.15)
        assert {result.status for result in await calls} == {OK}
        assert (station.counts["kills"], station.counts["restarts"]) == (0, 0)
        await _until(lambda: station.counts["waiting"] == 0)

    play(scenario())


def _pool_whose_start_raises(error: Exception) -> type[NodePool]:
    """Its classes are local, so that Ray sends them by value: its workers do not find this file."""

    class Fault:
        waiting = running = 0

        async def start(self) -> None:
            raise error

    class FaultyPool(NodePool):
        def __init__(self, config: SandboxConfig) -> None:
            super().__init__(config)
            self._pool = Fault()  # type: ignore[assignment]

    return FaultyPool


def _pool_that_cannot_be_made() -> type[NodePool]:
    class UnmadePool(NodePool):
        def __init__(self, config: SandboxConfig) -> None:
            raise OSError("no room")

    return UnmadePool


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (_pool_whose_start_raises(SandboxBroken("no zygote\ncomes up")), "no zygote comes up"),
        (_pool_that_cannot_be_made(), "OSError: no room"),
    ],
    ids=["broken", "unmade"],
)
def test_a_node_that_can_never_run_anything_is_given_up(play: Any, pool: type[NodePool], reason: str) -> None:
    async def scenario() -> None:
        sandbox = NodeSandbox(CONFIG, station=Station(CONFIG, pool=pool))
        with pytest.raises(SandboxBroken) as caught:
            await sandbox.start()
        assert str(caught.value) == f"the node's sandbox cannot run anything: {reason}"
        with pytest.raises(SandboxBroken):
            await asyncio.wait_for(sandbox.execute("print(1)", 20), 0.5)

    play(scenario())


def test_a_tier_that_cannot_be_had_is_told_at_once(play: Any) -> None:
    pool = _pool_whose_start_raises(SandboxRefused("sandbox.tier = 'full': not here"))

    async def scenario() -> None:
        sandbox = NodeSandbox(CONFIG, station=Station(CONFIG, pool=pool))
        with pytest.raises(SandboxRefused) as caught:
            await sandbox.start()
        assert str(caught.value) == "sandbox.tier = 'full': not here"
        assert type(caught.value) is SandboxRefused

    play(scenario())


def test_the_actor_is_made_again_when_its_maker_dies(play: Any) -> None:
    async def scenario() -> None:
        maker, user = Worker.remote(), Worker.remote()
        assert (await maker.execute.remote("print(1)")).status is OK
        pool = _traces()
        running = user.execute.remote(SLEEP.format(15))
        await _run(1)
        ray.kill(maker)
        assert (await running).status is INFRA
        assert (await user.execute.remote("print(1)")).status is OK
        assert (await user.stats.remote())["restarts"] == 1
        ray.kill(user)
        await _until(lambda: _left(pool) == [])

    play(scenario())


def test_a_service_is_used_where_the_config_names_one() -> None:
    with pytest.raises(SandboxBroken, match=r"sandbox\.url"):
        asyncio.run(open_node_sandbox(SandboxConfig(url="http://127.0.0.1:9")))


def test_nothing_is_left_after_the_shutdown(play: Any) -> None:
    async def scenario() -> None:
        sandbox = NodeSandbox(CONFIG, station=Station(CONFIG, Patience(ping_s=0.1, answer_s=0.5)))
        await sandbox.start()
        running = [asyncio.create_task(sandbox.execute(SLEEP.format(60), 60)) for _ in range(4)]
        await _run(4)
        pid, pool = _pid(), _traces()
        ray.shutdown()
        await _until(lambda: not os.path.exists(f"/proc/{pid}"))
        await _until(lambda: _left(pool) == [])
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        with pytest.raises(SandboxBroken, match="Ray was shut down"):
            await sandbox.execute("print(1)", 20)
        await sandbox.close()
        await asyncio.sleep(1)
        assert not ray.is_initialized()  # no ping has started another Ray

    play(scenario())
