"""The paper's tags as tokens: supervised conversations and rollouts of the same turns are the same."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tags
from fakes import ScriptedSandbox
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hermes import FORGERIES, assistant, control, tool

from retool.config import RolloutConfig
from retool.errors import ConfigError, DataError, InvariantError
from retool.formats import make_format, tags
from retool.formats.code_tags import INSTRUCTIONS, CodeTagsFormat
from retool.rollout import MAX_PIECES, Rollout, run_trajectory
from retool.types import Finish, Message, SamplingParams, StopReason, Task, TokenOutput, Trajectory

ROOMY = RolloutConfig(
    format="code_tags", max_turns=30, max_response_tokens=100_000, max_context=200_000, max_observation_tokens=10_000,
    max_malformed=0,
)  # fmt: skip
HEAD: list[Message] = [{"role": "system", "content": "Be BRIEF."}, {"role": "user", "content": "What is 2+2?"}]
TAGS = ["<code>", "</code>", "<interpreter>", "</interpreter>", "<answer>", "```", "````", '"""', "\n", "'", "#"]
tagged = st.lists(st.sampled_from(TAGS) | st.text(max_size=3), max_size=9).map("".join)
surprising = st.text() | tagged | st.sampled_from([*FORGERIES, "", "print('</code>')", "x = '''\n</code>\n'''", "\n\n"])
# What a turn is for is its program; the prose beside it must not spell a tag of its own.
prose = st.text().filter(lambda text: not any(tag in text for tag in TAGS[:5]))


@pytest.fixture
def fmt(tokenizer_name: tuple[str, Path | None]) -> CodeTagsFormat:
    return make_tags(*tokenizer_name)


@pytest.fixture
def tiny() -> CodeTagsFormat:
    return make_tags("tiny", None)


class StoppingPolicy:
    """Says the sampled tokens of a recorded chat one after the other, and stops where an engine would: at the token
    that completes a stop string, and at a stop token."""

    def __init__(self, fmt: CodeTagsFormat, ids: list[int]) -> None:
        self.fmt, self.left = fmt, list(ids)
        self.calls = 0
        self.seeds: list[int] = []

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        self.calls += 1
        self.seeds.append(params.seed)
        said: list[int] = []
        finish = Finish.LENGTH
        while self.left and len(said) < params.max_tokens:
            said.append(self.left.pop(0))
            text = self.fmt.decode(said)
            if said[-1] in params.stop_token_ids or any(stop in text for stop in params.stop):
                finish = Finish.STOP
                break
        return TokenOutput(said, [-0.5 - 0.001 * place for place in range(len(said))], finish)

    def release(self, session: str) -> None:
        pass


def roll(fmt: CodeTagsFormat, policy: StoppingPolicy, outputs: list[str], config: RolloutConfig = ROOMY) -> Trajectory:
    ran: defaultdict[str, int] = defaultdict(int)

    def answer(code: str, _: int) -> str:
        ran["programs"] += 1
        return outputs[ran["programs"] - 1]

    rollout = Rollout(policy, fmt, ScriptedSandbox(answer), config)
    return asyncio.run(run_trajectory(rollout, Task("t", "s", HEAD, "4"), 0, seed=0, step=0))


def learnt(ids: list[int], mask: list[int]) -> list[int]:
    return [i for i, m in zip(ids, mask, strict=True) if m]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(prose, st.lists(st.tuples(surprising, surprising), min_size=1, max_size=3)), max_size=3),
    answer=prose,
)
def test_a_conversation_equals_a_rollout_of_its_turns(
    fmt: CodeTagsFormat, turns: list[tuple[str, list[tuple[str, str]]]], answer: str
) -> None:
    messages, outputs = list(HEAD), list[str]()
    for content, calls in turns:
        codes = [code if code.strip() else "pass" for code, _ in calls]
        shown = [printed.rstrip("\n") for _, printed in calls]
        messages += [assistant(content, *codes), *map(tool, shown)]
        outputs += shown
    messages.append(assistant(answer))
    ids, mask = fmt.conversation_ids(messages)
    trajectory = roll(fmt, StoppingPolicy(fmt, learnt(ids, mask)), outputs)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.num_calls == len(outputs)
    assert (trajectory.ids_T, trajectory.mask_T) == (ids, mask)


def test_several_calls_of_one_message_are_turns_of_their_own(fmt: CodeTagsFormat) -> None:
    together = [*HEAD, assistant("Both.", "print(1)", "print(2)"), tool("1"), tool("2"), assistant("Done.")]
    apart = [*HEAD, assistant("Both.", "print(1)"), tool("1"), assistant("", "print(2)"), tool("2"), assistant("Done.")]
    assert fmt.conversation_ids(together) == fmt.conversation_ids(apart)


def test_a_prompt_may_hold_earlier_turns(fmt: CodeTagsFormat) -> None:
    """Also where one message stands twice, as the very same object."""
    call, result = assistant("I run.", "print(4)"), tool("4")
    turns = [call, result, call, result]
    whole, _ = fmt.conversation_ids([*HEAD, *turns, assistant("Four.")])
    prompt = fmt.prompt_ids([*HEAD, *turns])
    assert whole[: len(prompt)] == prompt
    assert fmt.decode(whole[len(prompt) :]) == "Four."


def test_tags_in_a_message_are_what_its_calls_are(fmt: CodeTagsFormat) -> None:
    """The published rows hold one string: it is taken apart, and what the environment wrote is not learnt."""
    code, printed = "print('</code>')\n", "</code>\n\n 2"
    calls = [*HEAD, assistant("I run.", code), tool(printed), assistant("It is 2.\n\n<answer>\n2\n</answer>")]
    text = tags.join("I run.", tags.write_code(code), tags.write_output(printed), "It is 2.", tags.write_answer("2"))
    assert fmt.conversation_ids([*HEAD, assistant(text)]) == fmt.conversation_ids(calls)


def test_the_mask_is_on_the_assistants_tokens_alone(fmt: CodeTagsFormat) -> None:
    messages = [*HEAD, assistant("I run.", "print(4)"), tool("four"), assistant("FOUR.")]
    ids, mask = fmt.conversation_ids(messages)
    runs = [(m, [i for i, _ in run]) for m, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1])]
    assert [m for m, _ in runs] == [0, 1, 0, 1]
    assert runs[0][1] == fmt.prompt_ids(HEAD)
    assert fmt.decode(runs[1][1]) == "I run.\n\n<code>\n```python\nprint(4)\n```\n</code>"
    assert fmt.decode(runs[2][1]) == "\n\n<interpreter>\nfour\n</interpreter>\n\n"
    assert fmt.decode(runs[3][1]) == "FOUR." and runs[3][1][-1] == fmt.end_id


def test_a_later_question_begins_a_new_message(fmt: CodeTagsFormat) -> None:
    more = [{"role": "user", "content": "And 3+3?"}, assistant("Six.")]
    ids, mask = fmt.conversation_ids([*HEAD, assistant("I run.", "print(4)"), tool("4"), assistant("Four."), *more])
    shown = fmt.tokenizer.decode(ids)
    assert shown.index("Four.") < shown.index("And 3+3?") < shown.index("Six.")
    assert learnt(ids, mask).count(fmt.end_id) == 2
    with pytest.raises(DataError, match="not over"):
        fmt.conversation_ids([*HEAD, assistant("I run.", "print(4)"), tool("4"), *more])


def test_a_tag_inside_a_program_ends_no_turn(fmt: CodeTagsFormat) -> None:
    """The engine stops at it; the rollout goes on with the same turn, and random numbers of its own."""
    code = "print('</code>', '</code>')"
    ids, mask = fmt.conversation_ids([*HEAD, assistant("", code), tool("x"), assistant("Done.")])
    policy = StoppingPolicy(fmt, learnt(ids, mask))
    trajectory = roll(fmt, policy, ["x"])
    assert [call.code for call in trajectory.turns[0].calls] == [code]
    assert policy.calls == 4
    assert len(set(policy.seeds)) == 4
    assert trajectory.logprobs_T[len(trajectory.prompt_ids)] == -0.5
    assert len(trajectory.turns[0].output.logprobs) == len(trajectory.turns[0].output.token_ids)
    assert trajectory.ids_T == ids


def test_a_model_that_repeats_the_tag_is_not_asked_for_ever(tiny: CodeTagsFormat) -> None:
    ids = [*tiny._encoder.plain("<code>\n```python\nprint('" + "</code>" * 5000).ids, tiny.end_id]
    policy = StoppingPolicy(tiny, ids)
    trajectory = roll(tiny, policy, [])
    assert policy.calls == MAX_PIECES
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert trajectory.turns[0].calls[0].error is not None
    assert tags.is_open(tiny.decode(ids)) and len(tags.find_calls(tiny.decode(ids))) == 1


def test_a_turn_that_goes_on_keeps_to_its_room(tiny: CodeTagsFormat) -> None:
    text = "<code>\n```python\nprint('</code>"
    ids = tiny._encoder.plain(text + "')\n```\n</code>").ids
    room = len(tiny._encoder.plain(text).ids)
    for extra, finish in ((0, Finish.LENGTH), (3, Finish.LENGTH)):
        config = ROOMY.model_copy(update={"max_response_tokens": room + extra})
        trajectory = roll(tiny, StoppingPolicy(tiny, ids), [], config)
        assert trajectory.stop_reason is StopReason.MAX_TOKENS
        assert trajectory.turns[0].output.finish is finish
        assert trajectory.response_length == room + extra


def test_a_program_without_its_end_is_answered_by_a_message(fmt: CodeTagsFormat) -> None:
    ids = [*fmt._encoder.plain("<code>\n```python\nprint(1)\n").ids, fmt.end_id]
    after = fmt.conversation_ids([*HEAD, assistant("Sorry.")])
    config = ROOMY.model_copy(update={"max_malformed": 1})
    trajectory = roll(fmt, StoppingPolicy(fmt, [*ids, *learnt(*after)]), [], config)
    assert trajectory.stop_reason is StopReason.ANSWERED
    first = trajectory.turns[0]
    assert first.calls[0].error is not None and "</code>" in first.calls[0].error
    assert "<interpreter>\nError: the code has no closing </code>\n</interpreter>" in first.observation_text
    assert trajectory.ids_T[len(trajectory.prompt_ids) : len(trajectory.prompt_ids) + len(ids)] == ids


def test_text_only_stops_at_no_tag(tiny: CodeTagsFormat) -> None:
    ids = [*tiny._encoder.plain("Use <code>x</code>? No.").ids, tiny.end_id]
    trajectory = roll(tiny, StoppingPolicy(tiny, ids), [], ROOMY.model_copy(update={"tools": False}))
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert len(trajectory.turns) == 1
    assert "<code>" not in tiny.decode(trajectory.prompt_ids)


def test_long_outputs_are_cut_in_the_middle(fmt: CodeTagsFormat) -> None:
    long = "\n".join(str(n) for n in range(5000))
    ids, mask = fmt.conversation_ids([*HEAD, assistant("", "print(1)"), tool("x"), assistant("Done.")])
    config = ROOMY.model_copy(update={"max_observation_tokens": 40})
    trajectory = roll(fmt, StoppingPolicy(fmt, learnt(ids, mask)), [long], config)
    shown = trajectory.turns[0].observation_text
    assert shown.startswith("\n\n<interpreter>\n0\n1\n") and shown.endswith("4999\n</interpreter>\n\n")
    assert "\n[...]\n" in shown
    frame = len(fmt._output_ids([""]))
    assert 30 <= len(trajectory.turns[0].observation_ids) - frame <= 42


def test_the_prompt_says_how_to_call(fmt: CodeTagsFormat) -> None:
    shown = fmt.tokenizer.decode(fmt.prompt_ids(HEAD))
    assert INSTRUCTIONS in shown and shown.index("BRIEF") < shown.index("<code>") < shown.index("2+2")
    assert "<code>" not in fmt.tokenizer.decode(fmt.prompt_ids(HEAD, tools=False))
    assert INSTRUCTIONS in fmt.tokenizer.decode(fmt.prompt_ids(HEAD[1:]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(result=surprising)
def test_no_result_can_forge_a_token(fmt: CodeTagsFormat, result: str) -> None:
    for last in (fmt.end_id, 1000):
        output = TokenOutput([5, last], [-0.1, -0.1], Finish.STOP)
        shown = fmt.observation_ids([result], output)
        assert control(fmt, shown) == control(fmt, fmt.observation_ids(["x"], output))


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Solve it.\n*user question:*\n{query}\nRemember.", encoding="utf-8")
    plain = make_tags("tiny", None)
    fmt = make_format(RolloutConfig(format="code_tags", prompt_file=str(path)), plain.tokenizer)
    shown = plain.tokenizer.decode(fmt.prompt_ids(HEAD))
    assert "Solve it.\n*user question:*\nWhat is 2+2?\nRemember." in shown
    assert "BRIEF" not in shown and INSTRUCTIONS not in shown
    path.write_text("Solve it.")
    with pytest.raises(ConfigError, match="query"):
        make_format(RolloutConfig(format="code_tags", prompt_file=str(path)), plain.tokenizer)
    with pytest.raises(ConfigError, match="give a text file"):
        make_format(RolloutConfig(format="code_tags", prompt_file=str(tmp_path)), plain.tokenizer)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([*HEAD, assistant("", "print(1)"), assistant("One.")], "in a row"),
        ([*HEAD, assistant("", "print(1)", "print(2)"), tool("1"), assistant("One.")], "2 calls and 1 tool"),
        ([*HEAD, assistant("<code>\n```python\nprint(1)\n```\n</code>\nIt is 1.")], "code without output"),
        ([*HEAD, assistant("Hi."), tool("1"), assistant("One.")], "0 calls and 1 tool"),
    ],
)
def test_a_chat_that_is_none_is_one_line(tiny: CodeTagsFormat, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        tiny.conversation_ids(messages)


def test_an_engine_that_says_nothing_is_found_out(tiny: CodeTagsFormat) -> None:
    with pytest.raises(InvariantError, match="without sampling"):
        roll(tiny, StoppingPolicy(tiny, []), [])
