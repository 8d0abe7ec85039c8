"""The built-in families: right answers, and splits that never overlap."""

import asyncio
import re
from collections import Counter

import pytest

from retool.config import SandboxConfig
from retool.data.world import (
    EASY_SHARE,
    EASY_TOOL_SHARE,
    FAMILIES,
    LARGE,
    SPLITS,
    TEXT_PROMPT_SHARE,
    make_conversations,
    make_tasks,
    program_for,
    split_of,
)
from retool.errors import ConfigError
from retool.sandbox import LocalSandbox
from retool.types import ExecutionResult, Task


def test_every_program_prints_its_answer_in_the_sandbox() -> None:
    tasks = make_tasks("train", 6 * len(FAMILIES), "programs")

    async def run() -> list[ExecutionResult]:
        async with LocalSandbox(SandboxConfig(workers=2)) as box:
            return await asyncio.gather(*(box.execute(program_for(task), 10) for task in tasks))

    for task, result in zip(tasks, asyncio.run(run()), strict=True):
        assert result.stdout.strip() == task.answer, (task.messages[-1]["content"], result)
    assert {t.meta["family"] for t in tasks} == {f.name for f in FAMILIES}


def question(task: Task) -> str:
    return str(task.messages[-1]["content"])


def test_splits_never_overlap_in_text_or_numbers() -> None:
    texts: dict[str, str] = {}
    combinations: dict[tuple[int, ...], str] = {}
    large: dict[int, str] = {}
    for split in SPLITS:
        for seed in range(3):
            for task in make_tasks(split, 480, seed):
                numbers = sorted(task.meta["numbers"])
                assert texts.setdefault(question(task), split) == split
                assert combinations.setdefault(tuple(numbers), split) == split
                for n in numbers:
                    if n >= LARGE:
                        assert large.setdefault(n, split) == split == split_of(n)
    assert len(large) > 1000


def test_numbers_of_a_task_are_those_of_its_text() -> None:
    """Else the disjointness of numbers would say nothing about the text."""
    for task in make_tasks("dev", 200, 0):
        in_text = Counter(int(n) for n in re.findall(r"\d+", question(task)))
        own = Counter(task.meta["numbers"])
        fixed = Counter({1: 1}) if task.meta["family"] == "power_sum" else Counter()
        assert in_text == own + fixed


def test_evaluation_tasks_are_distinct_and_shares_are_kept() -> None:
    tasks = make_tasks("test", 480, "eval")
    assert len({question(t) for t in tasks}) == 480
    assert sum(t.meta["easy"] for t in tasks) == pytest.approx(480 * EASY_SHARE, abs=1)
    assert [t.id for t in tasks] == [t.id for t in make_tasks("test", 480, "eval")]
    assert [question(t) for t in tasks] != [question(t) for t in make_tasks("test", 480, "other")]


def test_shares_of_the_demonstrations() -> None:
    conversations = make_conversations("train", 2000, 0, 0.4)
    with_tool_prompt = [c for c in conversations if c.tools]
    calls = [c for c in with_tool_prompt if any("tool_calls" in m for m in c.messages)]
    assert len(with_tool_prompt) / len(conversations) == pytest.approx(1 - TEXT_PROMPT_SHARE)
    expected = 0.4 * (1 - EASY_SHARE * (1 - EASY_TOOL_SHARE))
    assert len(calls) / len(with_tool_prompt) == pytest.approx(expected, abs=0.04)
    assert not any("tool_calls" in m for c in conversations if not c.tools for m in c.messages)


def test_unknown_split_and_exhausted_families_are_one_line() -> None:
    with pytest.raises(ConfigError, match="split = 'valid'"):
        make_tasks("valid", 1, 0)
    with pytest.raises(ConfigError, match="too few different tasks"):
        make_tasks("test", 100_000, 0)
