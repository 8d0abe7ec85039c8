"""Supervised conversations and rollouts of the same turns are the same tokens."""

from __future__ import annotations

import asyncio

from fakes import ScriptedPolicy, ScriptedSandbox
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hermes import FORGERIES, assistant, tool

from retool.config import RolloutConfig
from retool.formats.hermes import HermesFormat
from retool.rollout import Rollout, run_trajectory
from retool.types import Message, StopReason, Task

ROOMY = RolloutConfig(
    max_turns=9, max_response_tokens=100_000, max_context=200_000, max_observation_tokens=10_000, max_malformed=0
)
surprising = st.text() | st.sampled_from([*FORGERIES, "", "print('</tool_call>')", "'<tool_call>'", "\n\n", "x = 1\n"])
# What a call is for is its code; the prose beside it must not spell a call of its own.
prose = st.text().filter(lambda text: "<tool_call>" not in text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    system=surprising,
    question=surprising,
    turns=st.lists(st.tuples(prose, st.lists(st.tuples(surprising, surprising), min_size=1, max_size=3)), max_size=3),
    answer=prose,
)
def test_a_conversation_equals_a_rollout_of_its_turns(
    fmt: HermesFormat,
    system: str,
    question: str,
    turns: list[tuple[str, list[tuple[str, str]]]],
    answer: str,
) -> None:
    head: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    messages, script, outputs = list(head), [], {}
    for number, (content, calls) in enumerate(turns):
        # Distinct programs, so that each has one output.
        codes = [f"{code}#{number}.{index}" for index, (code, _) in enumerate(calls)]
        outputs |= {code: stdout.rstrip("\n") for code, (_, stdout) in zip(codes, calls, strict=True)}
        turn, shown = assistant(content, *codes), [tool(outputs[code]) for code in codes]
        script.append(fmt.turn_ids(turn, shown))
        messages += [turn, *shown]
    script.append(fmt.turn_ids(assistant(answer)))
    messages.append(assistant(answer))

    # Codes reach the sandbox as the tokenizer's normal form of what was written.
    policy, sandbox = ScriptedPolicy(lambda _, turn: script[turn]), ScriptedSandbox(lambda code, _: by_number(code))

    def by_number(code: str) -> str:
        return next(outputs[key] for key in outputs if key.rpartition("#")[2] == code.rpartition("#")[2])

    rollout = Rollout(policy, fmt, sandbox, ROOMY)
    trajectory = asyncio.run(run_trajectory(rollout, Task("t", "s", head, "4"), 0, seed=0, step=0))
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert len(trajectory.turns) == len(script)
    assert (trajectory.ids_T, trajectory.mask_T) == fmt.conversation_ids(messages)
