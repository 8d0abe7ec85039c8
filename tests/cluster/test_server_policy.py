"""verl's servers as a policy: what they are asked, what their answers mean, and that a rollout cannot tell them from a
local policy that samples the same tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from retool.cluster.policy import ServerPolicy
from retool.config import RolloutConfig
from retool.formats import make_format
from retool.formats.chat import ChatFormat
from retool.rollout import Rollout, run_trajectory
from retool.types import Finish, SamplingParams, StopReason, Task, TokenOutput, Trajectory
from tests.fakes import ScriptedPolicy, ScriptedSandbox, tiny_tokenizer

FORMATS = {name: make_format(RolloutConfig(format=name), tiny_tokenizer()) for name in ("hermes", "code_tags")}
HERMES = FORMATS["hermes"]
END = HERMES.stop_token_ids[0]
STOP = "</code>"


def ids_of(text: str) -> list[int]:
    return list(HERMES.tokenizer.encode(text, add_special_tokens=False))


@dataclass
class Answer:
    """verl's ``TokenOutput``, as far as it is read."""

    token_ids: list[int]
    log_probs: list[float] | None
    stop_reason: str | None = "completed"
    num_preempted: int | None = None
    extra_fields: dict[str, Any] = field(default_factory=dict)


class Client:
    """In place of verl's ``LLMServerClient``: says ``answers`` in turn, and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Answer:
        self.asked.append({"request_id": request_id, "prompt_ids": prompt_ids, "sampling_params": sampling_params})
        return self.answers[len(self.asked) - 1]


def ask(answer: Answer, params: SamplingParams, server: str = "vllm") -> tuple[TokenOutput, dict[str, Any]]:
    client = Client(answer)
    policy = ServerPolicy(client, HERMES.decode, name="uid", server=server)
    output = asyncio.run(policy.generate([1, 2, 3], params, session="5/t/0"))
    return output, client.asked[0]


def said(text: str, *more: int, **fields: Any) -> Answer:
    ids = [*ids_of(text), *more]
    return Answer(ids, [-0.1 * (i + 1) for i in range(len(ids))], **fields)


PARAMS = SamplingParams(0.7, 0.9, 20, max_tokens=8, stop=(STOP,), stop_token_ids=(END, 0), seed=99)


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "keeps"), [("vllm", {"include_stop_str_in_output": True}), ("sglang", {"no_stop_trim": True})]
)
def test_the_request(server: str, keeps: dict[str, bool]) -> None:
    """All that bears on the sampled tokens is said, so that no default of verl's or the server's does."""
    _, asked = ask(said("ab"), PARAMS, server)
    assert asked == {
        "request_id": "uid/5/t/0",
        "prompt_ids": [1, 2, 3],
        "sampling_params": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "max_tokens": 8,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "stop_token_ids": [END, 0],
            "stop": [STOP],
            **keeps,
        },
    }


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_without_stop_strings_or_a_top_k(server: str) -> None:
    _, asked = ask(said("ab"), replace(PARAMS, stop=(), top_k=0), server)
    assert asked["sampling_params"]["top_k"] == -1
    assert not {"stop", "include_stop_str_in_output", "no_stop_trim"} & set(asked["sampling_params"])


def test_an_unknown_server_is_no_default() -> None:
    with pytest.raises(KeyError):
        ServerPolicy(Client(), HERMES.decode, name="u", server="hf")


def test_the_callers_list_is_not_shared() -> None:
    """A rollout's list of ids grows while a request may still hold it."""
    client, ids = Client(said("ab")), [1, 2, 3]
    policy = ServerPolicy(client, HERMES.decode, name="u", server="vllm")
    asyncio.run(policy.generate(ids, PARAMS, session="s"))
    ids.append(4)
    assert client.asked[0]["prompt_ids"] == [1, 2, 3]


# --- what the answer means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "finish"),
    [
        pytest.param(said("ab", END), Finish.STOP, id="stop token"),
        pytest.param(said("abcdefg", END), Finish.STOP, id="stop token at the limit"),
        pytest.param(said("abcdefg", 0), Finish.STOP, id="the other stop token at the limit"),
        pytest.param(said("<code>"), Finish.STOP, id="ended before the limit"),
        pytest.param(said(f"a{STOP}"), Finish.STOP, id="stop string at the limit"),
        pytest.param(said("abcdefgh"), Finish.LENGTH, id="cut off"),
        pytest.param(said("abc</cod"), Finish.LENGTH, id="cut off inside the stop string"),
        pytest.param(said("abcd", END, *ids_of("efg")), Finish.LENGTH, id="a stop token in the middle ends nothing"),
        pytest.param(said("abcdefgh", stop_reason=None), Finish.LENGTH, id="cut off, no reason given"),
        pytest.param(said("ab", stop_reason="aborted"), Finish.ABORT, id="aborted"),
        pytest.param(said("ab", stop_reason="abort"), Finish.ABORT, id="aborted, SGLang's word"),
        pytest.param(said("abcdefg", END, stop_reason="aborted"), Finish.ABORT, id="aborted at the limit"),
        pytest.param(Answer([], []), Finish.ABORT, id="nothing"),
        pytest.param(Answer([], None), Finish.ABORT, id="nothing, without a list"),
    ],
)
def test_why_a_turn_ended(answer: Answer, finish: Finish) -> None:
    output, _ = ask(answer, PARAMS)
    assert output == TokenOutput(answer.token_ids, answer.log_probs or [], finish)


@pytest.mark.parametrize(("max_tokens", "finish"), [(9, Finish.STOP), (10, Finish.STOP)])
def test_a_stop_string_that_ends_inside_a_token(max_tokens: int, finish: Finish) -> None:
    """The token is kept whole: text stands behind the string, which is then in the middle."""
    output, _ = ask(said(f"a{STOP}\n"), replace(PARAMS, max_tokens=max_tokens))
    assert output.finish is finish


def test_without_stop_strings_their_text_is_nothing_special() -> None:
    output, _ = ask(said(f"a{STOP}"), replace(PARAMS, stop=()))
    assert output.finish is Finish.LENGTH


def test_tokens_and_logprobs_are_plain_numbers() -> None:
    """vLLM's come as numpy's, which JSON and Parquet do not take everywhere."""
    import numpy as np

    answer = Answer(list(np.array([5, END])), list(np.array([-0.5, -0.25], dtype=np.float32)))
    output, _ = ask(answer, PARAMS)
    assert (output.token_ids, output.logprobs) == ([5, END], [-0.5, -0.25])
    assert {type(x) for x in output.token_ids} == {int} and {type(x) for x in output.logprobs} == {float}


@pytest.mark.parametrize(("extra", "version"), [({"global_steps": 17}, 17), ({"global_steps": None}, 0), ({}, 0)])
def test_the_policys_version(extra: dict[str, Any], version: int) -> None:
    output, _ = ask(said("ab", END, extra_fields=extra), PARAMS)
    assert output.policy_version == version


def test_time_and_preemptions_add_up() -> None:
    answers = [said("a", END, num_preempted=2), said("b", END, num_preempted=None), said("c", END, num_preempted=1)]

    class Slow(Client):
        async def generate(self, request_id: str, **request: Any) -> Answer:
            await asyncio.sleep(0.02)
            return await super().generate(request_id, **request)

    async def job() -> ServerPolicy:
        policy = ServerPolicy(Slow(*answers), HERMES.decode, name="u", server="vllm")
        for _ in answers:
            await policy.generate([1], PARAMS, session="s")
        policy.release("s")
        return policy

    policy = asyncio.run(job())
    assert policy.preempted == 3
    assert policy.seconds >= 0.06


# --- a rollout cannot tell it from a local policy ---------------------------------------------------------------------


def hermes_call(code: str) -> str:
    return "<tool_call>\n" + json.dumps({"name": "code_interpreter", "arguments": {"code": code}}) + "\n</tool_call>"


def tags_call(code: str) -> str:
    return f"<code>\n```python\n{code}\n```\n{STOP}"


ANSWER = "So <answer>\n\\boxed{4}\n</answer>"
SCRIPTS: dict[str, list[list[int]]] = {
    "hermes": [
        [*ids_of("Let me see. " + hermes_call("2+2")), END],
        [*ids_of(hermes_call("3*3") + "<tool_call>\nnot json\n</tool_call>"), END],
        [*ids_of(r"It is \boxed{4}."), END],
    ],
    "code_tags": [
        ids_of("Let me see.\n" + tags_call("2+2")),
        # a program that prints the tag: the stop string ends a piece, not the turn
        ids_of(f"<code>\n```python\nprint('{STOP}"),
        ids_of(f"')\n```\n{STOP}"),
        [*ids_of(ANSWER), END],
    ],
}


class LocalClient:
    """Servers that sample what ``ScriptedPolicy`` does: a script's turns, cut to ``max_tokens``, and its own
    log-probabilities."""

    def __init__(self, script: Callable[[str, int], list[int] | TokenOutput]) -> None:
        self.script, self.turn, self.count = script, 0, 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Answer:
        uid, _, session = request_id.partition("/")
        assert uid == "uid"
        answered = self.script(session, self.turn)
        self.turn += 1
        if isinstance(answered, TokenOutput):
            return Answer(answered.token_ids, answered.logprobs, "aborted")
        kept = answered[: sampling_params["max_tokens"]]
        self.count += len(kept)
        # as ScriptedPolicy adds them up, so that they are equal to the last bit
        return Answer(kept, list(itertools.islice(falling(), self.count - len(kept), self.count)))


def falling() -> Any:
    value = 0.0
    while True:
        value -= 0.001
        yield value


def roll(policy: Any, fmt: ChatFormat, **changes: Any) -> Trajectory:
    config = RolloutConfig.model_validate(
        {"format": "hermes", "max_response_tokens": 2000, "max_context": 5000, "max_turns": 5,
           "max_observation_tokens": 100} | changes
    )  # fmt: skip
    sandbox = ScriptedSandbox(lambda code, count: {"2+2": "4\n"}.get(code, f"ran {code}"))
    rollout = Rollout(policy, fmt, sandbox if config.tools else None, config)
    task = Task("t1", "s", [{"role": "user", "content": "What is 2 + 2?"}], "4")
    return asyncio.run(run_trajectory(rollout, task, 3, seed=11, step=5))


def both(name: str, script: Callable[[str, int], list[int] | TokenOutput], **changes: Any) -> Trajectory:
    """The local policy's trajectory; the servers' must be the same one."""
    fmt = FORMATS[name]
    local = roll(ScriptedPolicy(script), fmt, **changes)
    client = LocalClient(script)
    served = roll(ServerPolicy(client, fmt.decode, name="uid", server="vllm"), fmt, **changes)
    for aspect in ("prompt_ids", "ids_T", "mask_T", "logprobs_T", "stop_reason", "num_turns"):
        assert getattr(served, aspect) == getattr(local, aspect), aspect
    assert served.turns == local.turns
    assert replace(served, sandbox_s=0.0) == replace(local, sandbox_s=0.0)
    return local


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_tokens_make_the_same_trajectory(name: str) -> None:
    script = SCRIPTS[name]
    found = both(name, lambda session, turn: script[turn])
    assert found.stop_reason is StopReason.ANSWERED
    assert len(found.turns) == 3
    assert [len(turn.calls) for turn in found.turns] == ([1, 2, 0] if name == "hermes" else [1, 1, 0])
    sampled = [token for token, mask in zip(found.ids_T, found.mask_T, strict=True) if mask]
    assert sampled == list(itertools.chain(*script))


@pytest.mark.parametrize("name", FORMATS)
def test_wherever_it_is_cut_off(name: str) -> None:
    """Each place in the first two turns may be the last one that there is room for."""
    script = SCRIPTS[name]
    whole = both(name, lambda session, turn: script[turn])
    first = whole.turns[0]
    until = len(first.output.token_ids) + len(first.observation_ids) + len(whole.turns[1].output.token_ids)
    reasons = set()
    for room in range(1, until + 2):
        found = both(name, lambda session, turn: script[turn], max_response_tokens=room)
        assert found.response_length <= room
        reasons.add(found.stop_reason)
    assert reasons == {StopReason.MAX_TOKENS}


@pytest.mark.parametrize("name", FORMATS)
def test_a_context_that_is_full(name: str) -> None:
    script = SCRIPTS[name]
    prompt = len(both(name, lambda session, turn: script[turn]).prompt_ids)
    found = both(name, lambda session, turn: script[turn], max_context=prompt + 30, max_response_tokens=100)
    assert found.stop_reason is StopReason.CONTEXT_FULL
    assert len(found.ids_T) == prompt + 30


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cut", [0, 5])
def test_a_server_that_aborts_is_a_fault_of_the_machine(name: str, cut: int) -> None:
    script = SCRIPTS[name]

    def aborted(session: str, turn: int) -> list[int] | TokenOutput:
        return script[0] if turn == 0 else TokenOutput(script[1][:cut], [-0.5] * cut, Finish.ABORT)

    assert both(name, aborted).stop_reason is StopReason.INFRA


def test_text_alone() -> None:
    """Without the tool a call is no call, and the stop string of one no end."""
    turn = [*ids_of(tags_call("2+2") + ANSWER), END]
    found = both("code_tags", lambda session, turn_number: turn, tools=False)
    assert (found.stop_reason, len(found.turns), found.num_calls) == (StopReason.ANSWERED, 1, 0)


def test_versions_of_a_turn_in_pieces() -> None:
    """Weights may change between two pieces; the turn is as old as its oldest token."""
    fmt, script = FORMATS["code_tags"], SCRIPTS["code_tags"]
    answers = [
        Answer(ids, [-0.1] * len(ids), extra_fields={"global_steps": step})
        for ids, step in zip(script, (3, 4, 6, 7), strict=True)
    ]
    found = roll(ServerPolicy(Client(*answers), fmt.decode, name="uid", server="sglang"), fmt)
    assert [turn.output.policy_version for turn in found.turns] == [3, 4, 7]
