"""Every shipped recipe, and the whole path on real input: the real tokenizer, its template, real text."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from retool import evaluate, rl, sft
from retool.config import ALGORITHMS, SHIPPED_RECIPES, Recipe, load_recipe, recipe_path
from retool.data.sources import open_source
from retool.engine.runtime import load_runtime, open_sandbox
from retool.progress import Progress
from retool.rollout import run_groups
from retool.store import RunFolder
from retool.update import Trainer

QUIET = Progress(quiet=True)


@pytest.fixture
def smoke(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RETOOL_DATA", str(shared_data))

    def make(name: str, *overrides: str) -> Recipe:
        small = ["data.train_size=24", "data.test_size=2", "run.threads=2", "sandbox.workers=2", "sft.steps=2",
                 "sft.batch_size=4", "rl.steps=1", "rl.prompts=2", "rollout.max_response_tokens=24"]  # fmt: skip
        return load_recipe(
            SHIPPED_RECIPES / "gsm8k-smoke.toml", [*small, f"run.out={tmp_path}", f"run.name={name}", *overrides]
        )

    return make


def test_the_whole_path_on_gsm8k(smoke: Any) -> None:
    fine_tuned = sft.run(smoke("sft"), progress=QUIET)
    assert math.isfinite(fine_tuned["val_loss"])
    start = [f"model.path={fine_tuned['checkpoint']}", "model.random_init={}", "model.tokenizer="]
    trained = rl.run(smoke("rl", *start), progress=QUIET)
    recipe = smoke("eval", f"model.path={trained['checkpoint']}", *start[1:])
    found = evaluate.run(recipe, progress=QUIET)
    assert found["samples"] == 4
    assert found["problems"] == 2
    (line,) = RunFolder.open(Path(recipe.run.out) / "rl").metrics()
    assert line["prompt_length/min"] > 100


def test_an_update_over_the_real_vocabulary(smoke: Any) -> None:
    """Random weights answer nothing right, so that no group of the run above teaches: here rewards are made up."""
    recipe = smoke("update")
    runtime = load_runtime(recipe)
    tasks = open_source(recipe).train_tasks(0, 2)

    async def roll() -> Any:
        async with open_sandbox(recipe) as sandbox:
            rollout = runtime.rollout(runtime.policy(), sandbox)
            return await run_groups(rollout, tasks, 4, seed=0, step=0)

    groups = asyncio.run(roll())
    for group in groups:
        for i, trajectory in enumerate(group.trajectories):
            trajectory.reward = (-1.0) ** i
    metrics = Trainer(runtime.model, recipe).step(groups, 0, 0)
    assert metrics["training/rollout_logprob_gap_max"] <= 1e-3
    assert metrics["actor/grad_norm"] > 0
    assert metrics["actor/entropy"] == pytest.approx(math.log(len(runtime.tokenizer)), abs=0.5)


def test_file_splits_never_overlap(smoke: Any) -> None:
    source = open_source(smoke("data"))
    train = {t.id for t in source.train_tasks(0, 60)}
    dev = {t.id for t in source.eval_tasks("dev", 100)}
    assert train
    assert dev
    assert not train & dev
    assert [t.id for t in source.train_tasks(7, 3)] == [t.id for t in open_source(smoke("data")).train_tasks(7, 3)]
    conversations, held_out = source.conversations(0)
    assert not {c.id for c in conversations} & {c.id for c in held_out}


def test_an_epoch_takes_every_task_once(smoke: Any) -> None:
    source = open_source(smoke("data", "data.train_size=20"))
    first_epoch = [t.id for t in source.train_tasks(0, 18)]
    assert len(set(first_epoch)) == 18


@pytest.mark.parametrize("name", [p.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix()
                                  for p in SHIPPED_RECIPES.rglob("*.toml")])  # fmt: skip
def test_an_algorithm_named_on_the_command_line_is_whole(name: str) -> None:
    """No recipe sets by itself what the name of an algorithm stands for, so that half of another would remain."""
    for algorithm, settings in ALGORITHMS.items():
        rl_section = load_recipe(recipe_path(name), [f"rl.algorithm={algorithm}", "rl.group_size=4"]).rl.model_dump()
        for key, value in ({"clip_low": 0.2, "clip_high": 0.28} | settings).items():
            found = rl_section[key]
            assert found == value or (isinstance(value, dict) and value.items() <= found.items()), (algorithm, key)
