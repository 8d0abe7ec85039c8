"""Where a recipe's tasks and conversations come from: one small interface over the data sets."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

from retool.config import DataConfig, Recipe
from retool.data import gsm8k, world
from retool.data.conversations import with_answer_tags
from retool.errors import ConfigError, DataError
from retool.types import Conversation, Task

HELD_OUT = 128
"""Conversations kept back for the in-loop loss, at most a tenth of the file."""


class Source(Protocol):
    """What the jobs need of a data set."""

    def train_tasks(self, step: int, count: int) -> list[Task]:
        """The tasks of an RL step: a function of the seed and the step alone."""
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

    def train_tasks(self, step: int, count: int) -> list[Task]:
        return world.make_tasks("train", count, f"rl/{self.seed}/{step}")

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
    """Demonstrations of any origin, their last turn as the format wants it."""
    return [with_answer_tags(c) if name == "code_tags" else c for c in conversations]


class Files:
    """Tasks and conversations read from GSM8K's files. Its test file is never learnt from; dev is the last tenth of
    the training file, which training leaves out."""

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self._train: list[Task] = []

    def _training(self) -> list[Task]:
        if not self.config.train_file:
            raise ConfigError("data.train_file is empty: name the training file")
        if not self._train:
            tasks = gsm8k.load_tasks(self.config.train_file, "train")
            self._train = tasks[: self.config.train_size or len(tasks)]
            if len(self._train) < 2:
                raise DataError(f"data.train_file = {self.config.train_file!r}: fewer than two problems; give more")
        return self._train

    def _dev_count(self, total: int) -> int:
        return max(1, total // 10)

    def train_tasks(self, step: int, count: int) -> list[Task]:
        tasks = self._training()
        tasks = tasks[: -self._dev_count(len(tasks))]
        chosen: list[Task] = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(tasks))
            order = random.Random(f"epoch/{self.seed}/{epoch}").sample(range(len(tasks)), len(tasks))
            chosen.append(tasks[order[index]])
        return chosen

    def eval_tasks(self, split: str, count: int) -> list[Task]:
        if split == "dev":
            tasks = self._training()
            return tasks[-self._dev_count(len(tasks)) :][:count]
        if not self.config.test_file:
            raise ConfigError("data.test_file is empty: name the test file")
        return gsm8k.load_tasks(self.config.test_file, "test")[:count]

    def conversations(self, count: int) -> tuple[list[Conversation], list[Conversation]]:
        if not self.config.train_file:
            raise ConfigError("data.train_file is empty: name the training file")
        conversations = gsm8k.load_conversations(self.config.train_file)
        conversations = conversations[: self.config.train_size or len(conversations)]
        held = self._dev_count(len(conversations))
        return conversations[:-held], conversations[-held:][:HELD_OUT]


def open_source(recipe: Recipe) -> Source:
    return World(recipe) if recipe.data.train == "world" else Files(recipe.data, recipe.run.seed)
