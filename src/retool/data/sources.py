"""Where a recipe's tasks and conversations come from: one small interface over the data sets."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import islice
from typing import Protocol

from retool.config import Recipe
from retool.data import gsm8k, world
from retool.data.conversations import read_conversations, with_answer_tags, with_calls
from retool.data.conversion import convert_set
from retool.data.prepare import Cleaning, Report, clean
from retool.data.sets import SETS, load_problems
from retool.errors import ConfigError, DataError
from retool.types import Conversation, Task

HELD_OUT = 128
"""Conversations kept back for the in-loop loss, at most a tenth of the set."""

_log = logging.getLogger(__name__)


class Source(Protocol):
    """What the jobs need of a data set."""

    def train_tasks(self, first: int, count: int) -> list[Task]:
        """Tasks ``first``, ``first + 1``, … of RL's endless stream: a function of the seed and these numbers alone."""
        ...

    def eval_tasks(self, split: str, count: int) -> list[Task]:
        """At most ``count`` tasks of ``split`` (dev or test), the same ones for every seed."""
        ...

    def conversations(self, count: int) -> tuple[list[Conversation], list[Conversation]]:
        """Demonstrations to learn (at least ``count`` where the source makes them, else the file's) and held-out
        ones."""
        ...


class World:
    """The quickstart's own families."""

    def __init__(self, recipe: Recipe):
        self.config, self.seed, self.format = recipe.data, recipe.run.seed, recipe.rollout.format
        self.block = recipe.rl.prompts
        """Tasks are made in blocks, each with its share of every family."""

    def train_tasks(self, first: int, count: int) -> list[Task]:
        blocks = range(first // self.block, -(-(first + count) // self.block))
        tasks = [task for block in blocks for task in self._block(block)]
        return tasks[first % self.block :][:count]

    def _block(self, number: int) -> list[Task]:
        return world.make_tasks("train", self.block, f"rl/{self.seed}/{number}")

    def eval_tasks(self, split: str, count: int) -> list[Task]:
        return world.make_tasks(split, count, "eval")

    def conversations(self, count: int) -> tuple[list[Conversation], list[Conversation]]:
        if not count:
            raise ConfigError("sft.steps = 0: the built-in world has no end, so say how many steps")
        share = self.config.sft_tool_share
        return (
            _in_format(self.format, world.make_conversations("train", count, self.seed, share)),
            _in_format(self.format, world.make_conversations("dev", HELD_OUT, "held-out", share)),
        )


def _in_format(name: str, conversations: Iterable[Conversation]) -> list[Conversation]:
    """Demonstrations of any origin, as the format wants them."""
    return [with_answer_tags(c) if name == "code_tags" else with_calls(c) for c in conversations]


class Sets:
    """Tasks and conversations of data sets. A test set is never learnt from; dev is the last tenth of the training set,
    which training leaves out."""

    def __init__(self, recipe: Recipe):
        self.config, self.seed, self.format = recipe.data, recipe.run.seed, recipe.rollout.format

    @cached_property
    def _training(self) -> list[Task]:
        config = self.config
        report = Report(config.train)
        wanted = Cleaning(chinese=config.chinese, against=config.against)
        problems = load_problems(config.train, file=config.train_file, columns=self._columns(config.train))
        tasks = [problem.task() for problem in clean(problems, wanted, report)]
        if report.dropped:
            left_out = report.dropped.total()
            _log.warning("%s: %d of %d rows left out: %s", config.train, left_out, report.read, counts(report.dropped))
        tasks = tasks[: config.train_size or len(tasks)]
        if len(tasks) < 2:
            raise DataError(f"data.train = {config.train!r}: fewer than two problems; give more")
        return tasks

    def _columns(self, spec: str) -> dict[str, str]:
        """The recipe's columns are those of files of one's own."""
        return {} if spec in SETS else self.config.columns

    def train_tasks(self, first: int, count: int) -> list[Task]:
        tasks = self._training[: -_dev_count(len(self._training))]
        chosen: list[Task] = []
        for place in range(first, first + count):
            epoch, index = divmod(place, len(tasks))
            chosen.append(tasks[_epoch_order(self.seed, epoch, len(tasks))[index]])
        return chosen

    def eval_tasks(self, split: str, count: int) -> list[Task]:
        if split == "dev":
            return self._training[-_dev_count(len(self._training)) :][:count]
        config = self.config
        known = SETS.get(config.train)
        if config.test:
            found = load_problems(config.test, file=config.test_file, columns=self._columns(config.test))
        elif known and "test" in known.splits:
            found = load_problems(config.train, file=config.test_file, split="test")
        elif config.test_file:
            found = load_problems(config.test_file, columns=config.columns)
        else:
            raise ConfigError(
                f"data.test is empty, and data.train = {config.train!r} has no test split: name a set, e.g. 'aime-2025'"
            )
        return [problem.task() for problem in islice(found, count)]

    def conversations(self, count: int) -> tuple[list[Conversation], list[Conversation]]:
        found = _in_format(self.format, self._demonstrations())
        found = found[: self.config.train_size or len(found)]
        if len(found) < 2:
            raise DataError(f"data.train = {self.config.train!r}: fewer than two conversations; give more")
        held = _dev_count(len(found))
        return found[:-held], found[-held:][:HELD_OUT]

    def _demonstrations(self) -> list[Conversation]:
        config = self.config
        known = SETS.get(config.train)
        if known and known.kind == "conversations":
            report = Report(config.train)
            wanted = Cleaning(against=config.against)
            rows = convert_set(config.train, file=config.train_file, wanted=wanted, report=report)
            found, left_out = [Conversation(id, row.messages()) for id, row in rows], report.dropped
        elif config.train == "gsm8k":
            found, left_out = gsm8k.convert(load_problems(config.train, file=config.train_file))
        elif known:
            raise ConfigError(
                f"data.train = {config.train!r} holds problems without demonstrations: for sft name conversations "
                "(retool-sft, gsm8k, or a file that 'retool cold-start' wrote)"
            )
        else:
            found, left_out = list(read_conversations(config.train_file or config.train)), Counter[str]()
        if left_out:
            _log.warning("%s: %d rows left out: %s", config.train, left_out.total(), counts(left_out))
        return found


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of an epoch's tasks."""
    return random.Random(f"epoch/{seed}/{epoch}").sample(range(size), size)


def _dev_count(total: int) -> int:
    return max(1, total // 10)


def counts(reasons: Counter[str]) -> str:
    """``12 no answer, 3 unclosed <code>``."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def open_source(recipe: Recipe) -> Source:
    return World(recipe) if recipe.data.train == "world" else Sets(recipe)
