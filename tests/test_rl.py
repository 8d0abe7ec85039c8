"""The RL job: what is learnt from and what is not, and a whole small run on real parts."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retool import evaluate, rl, sft
from retool.algo.batch import Sample, micro_batches
from retool.config import Recipe, RLConfig, make_recipe
from retool.data.sources import open_source
from retool.engine.learner import token_logprobs
from retool.engine.runtime import load_runtime, open_sandbox
from retool.errors import UserError
from retool.metrics import definition
from retool.progress import Progress
from retool.rollout import run_groups
from retool.store import RunFolder, read_metrics, read_trajectories
from retool.types import Finish, StopReason, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn
from retool.update import Lesson, Trainer, set_advantages
from tests.engine.test_learner import CONFIGS, make_model

QUIET = Progress(quiet=True)


def make_trajectory(sample: int, reward: float, stop: StopReason = StopReason.ANSWERED) -> Trajectory:
    task = Task("t", "s", [], "1")
    turns = [
        Turn(TokenOutput([10 + sample, 11], [-1.0, -2.0], Finish.STOP), observation_ids=[20, 21, 22]),
        Turn(TokenOutput([30 + sample], [-3.0], Finish.STOP)),
    ]
    return Trajectory(task, sample, [1, 2, 3], turns, stop, reward)


def make_group(rewards: list[float], failed: list[float] | None = None) -> TrajectoryGroup:
    kept = [make_trajectory(i, r) for i, r in enumerate(rewards)]
    lost = [make_trajectory(50 + i, r, StopReason.INFRA) for i, r in enumerate(failed or [])]
    return TrajectoryGroup(Task("t", "s", [], "1"), kept, lost)


def samples_of(groups: list[TrajectoryGroup], **config: Any) -> list[Sample]:
    """What is learnt from the groups."""
    lessons = [
        Lesson(t, number, Sample(t.ids_T, t.mask_T, t.logprobs_T))
        for number, group in enumerate(groups)
        for t in group.trajectories
    ]
    return [lesson.sample for lesson in set_advantages(lessons, RLConfig(**config))]


def trainer_of(model: Any, config: dict[str, Any]) -> Trainer:
    return Trainer(model, make_recipe({"rl": config}))


def test_a_trajectory_becomes_exactly_its_ids_and_its_mask() -> None:
    """Prompt and observation are 0 in the mask; log-probabilities stand at their tokens."""
    first, second = samples_of([make_group([1.0, -1.0])])
    assert first.ids_T == [1, 2, 3, 10, 11, 20, 21, 22, 30]
    assert first.mask_T == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert first.logprobs_T == [0, 0, 0, -1.0, -2.0, 0, 0, 0, -3.0]
    assert first.advantage == pytest.approx(-second.advantage)
    assert first.advantage > 0


def test_groups_of_equal_rewards_are_dropped() -> None:
    groups = [make_group([1.0, 1.0]), make_group([-1.0, -1.0]), make_group([1.0, -1.0])]
    assert len(samples_of(groups)) == 2
    assert [t.advantage is None for g in groups for t in g.trajectories] == [True] * 4 + [False] * 2


def test_infra_failures_do_not_move_the_advantages_of_the_others() -> None:
    whole, without = make_group([1.0, -1.0, -1.0], failed=[-1.0, 1.0]), make_group([1.0, -1.0, -1.0])
    assert samples_of([whole]) == samples_of([without])
    assert [t.advantage for t in whole.trajectories] == [t.advantage for t in without.trajectories]
    assert all(t.advantage is None for t in whole.infra_failed)


def test_groups_left_with_one_or_none_are_dropped() -> None:
    assert samples_of([make_group([1.0]), make_group([])]) == []


def test_an_update_raises_what_was_good_and_lowers_what_was_bad() -> None:
    model = make_model(CONFIGS[0])
    group = make_group([1.0, -1.0])

    def total(sample: Sample) -> float:
        with torch.no_grad():
            return sum(float(token_logprobs(model, b)[0].sum()) for b in micro_batches([sample], 1000))

    samples = samples_of([group])
    before = [total(s) for s in samples]
    for t in group.trajectories:  # on-policy: the sampler's log-probabilities are the model's own
        (batch,) = micro_batches([Sample(t.ids_T, t.mask_T, t.logprobs_T)], 1000)
        own = iter(token_logprobs(model, batch)[0].tolist())
        for turn in t.turns:
            turn.output.logprobs[:] = [next(own) for _ in turn.output.logprobs]
        del t.__dict__["logprobs_T"]
    metrics = trainer_of(model, {"prompts": 1, "steps": 1, "optim": {"lr": 1e-3}}).step([group], 0, 0)
    good, bad = (total(s) - b for s, b in zip(samples, before, strict=True))
    assert good > 0 > bad
    assert metrics["training/rollout_logprob_gap_max"] < 1e-5
    assert metrics["tokens/learnt"] == 6


def test_several_mini_batches_make_several_updates() -> None:
    trainer = trainer_of(make_model(CONFIGS[0]), {"prompts": 4, "minibatch_prompts": 1})
    metrics = trainer.step([make_group([1.0, -1.0]) for _ in range(4)], 0, 0)
    assert metrics["actor/updates"] == 4
    assert trainer.actor.step_count == 4


def test_a_step_with_nothing_to_learn_makes_no_update() -> None:
    trainer = trainer_of(make_model(CONFIGS[0]), {"prompts": 1})
    assert trainer.step([make_group([1.0, 1.0])], 0, 0)["actor/updates"] == 0
    assert trainer.actor.step_count == 0


# --- whole small runs, with the packaged model, the real sandbox and the real engine ---------------------------------


def small_recipe(out: Path, name: str, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, dict[str, Any]] = {
        "run": {"out": str(out), "name": name, "seed": 3, "deterministic": True, "threads": 1},
        "model": {"device": "cpu"},
        "sandbox": {"workers": 2, "timeout_s": 5.0},
        "rollout": {"max_turns": 2, "max_response_tokens": 96, "max_context": 320},
        "engine": {"kv_budget_mb": 32},
        "sft": {"steps": 3, "batch_size": 4, "optim": {"lr": 1e-3}},
        "rl": {"steps": 3, "prompts": 3, "group_size": 4, "save_every": 1, "eval_every": 2, "eval_size": 4,
               "optim": {"lr": 1e-4}},
    }  # fmt: skip
    for section, values in sections.items():
        tree[section] |= values
    return make_recipe(tree)


def weights(checkpoint: Path) -> torch.Tensor:
    tensors = load_file(checkpoint / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs")
    summary = rl.run(small_recipe(out, "whole"), progress=QUIET)
    return out, summary


def test_a_run_leaves_its_whole_story(whole_run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole_run
    folder = RunFolder.open(out / "whole")
    assert summary["steps"] == 3
    assert folder.summary() == summary
    assert folder.config()["run"]["seed"] == 3
    assert folder.environment()["versions"]["torch"]
    lines = folder.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        unknown = [name for name in line if name != "step" and definition(name) is None]
        assert not unknown, f"metrics without a definition: {unknown}"
        # 12 trajectories of an untrained model may all be wrong: then there is no update and no gap
        if line["actor/updates"]:
            assert line["training/rollout_logprob_gap_max"] <= 1e-3
        for part in ("rollout", "train", "step"):
            assert line[f"timing_s/{part}"] > 0
    assert "val-core/world/acc/mean@1" in lines[1]
    trajectories = read_trajectories(folder.step_trajectories(3))
    assert len(trajectories) == 12
    assert all(t.grade is not None for t in trajectories)


def test_its_checkpoint_is_loaded_by_transformers(whole_run: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, summary = whole_run
    model = AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
    tokenizer = AutoTokenizer.from_pretrained(summary["checkpoint"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert model.config._attn_implementation != "retool"


def test_an_interrupted_run_goes_on_to_the_same_end_bit_by_bit(whole_run: tuple[Path, dict[str, Any]]) -> None:
    """Invariant 5. The interrupted run is cut after its second step, with a metrics line and trajectories too many."""
    out, summary = whole_run
    recipe = small_recipe(out, "cut")
    runtime = load_runtime(recipe)
    folder = RunFolder(out / "cut")
    folder.write_config(recipe)

    async def interrupted() -> None:
        async with open_sandbox(recipe) as sandbox:
            task = asyncio.ensure_future(rl.train(runtime, folder, sandbox, progress=QUIET))
            while 2 not in folder.checkpoint_steps():
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(interrupted())
    assert folder.latest_checkpoint() == folder.checkpoint_path(folder.checkpoint_steps()[-1])
    again = rl.run(recipe, progress=QUIET)
    assert torch.equal(weights(Path(again["checkpoint"])), weights(Path(summary["checkpoint"])))

    def timeless(path: Path) -> list[dict[str, float]]:
        return [
            {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/", "tool/duration", "tool/wait"))}
            for line in read_metrics(path)
        ]

    assert json.dumps(timeless(out / "cut" / "metrics.jsonl")) == json.dumps(timeless(out / "whole" / "metrics.jsonl"))


def test_a_finished_run_typed_again_changes_nothing(whole_run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole_run
    before = (out / "whole" / "metrics.jsonl").read_bytes()
    assert rl.run(small_recipe(out, "whole"), progress=QUIET)["steps"] == 3
    assert (out / "whole" / "metrics.jsonl").read_bytes() == before
    assert RunFolder.open(out / "whole").summary() == summary


def test_other_settings_in_the_same_folder_are_refused(whole_run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = whole_run
    with pytest.raises(UserError, match="other settings"):
        rl.run(small_recipe(out, "whole", rl={"clip_high": 0.4}), progress=QUIET)
    with pytest.raises(UserError, match="exists already"):
        rl.run(small_recipe(out, "whole", run={"resume": "never"}), progress=QUIET)


def test_sft_learns_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"steps": 6, "batch_size": 8, "eval_every": 3, "save_every": 2}
    whole = sft.run(small_recipe(tmp_path, "whole", sft=sections), progress=QUIET)
    lines = RunFolder.open(tmp_path / "whole").metrics()
    assert lines[-1]["val/loss"] < lines[2]["val/loss"] < lines[0]["train/loss"]
    assert all(definition(name) for line in lines for name in line if name != "step")

    recipe = small_recipe(tmp_path, "cut", sft=sections)
    sft.run(recipe, progress=QUIET)
    folder = RunFolder.open(tmp_path / "cut")
    for step in (4, 6):  # as if the run had died after its second step
        shutil.rmtree(folder.checkpoint_path(step))
    again = sft.run(recipe, progress=QUIET)
    assert torch.equal(weights(Path(again["checkpoint"])), weights(Path(whole["checkpoint"])))
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_job_does_not_take_up_another_jobs_run(whole_run: tuple[Path, dict[str, Any]]) -> None:
    """SFT and RL of one recipe have the same folder by default: RL must not take SFT's steps for its own."""
    out, _ = whole_run
    with pytest.raises(UserError, match="holds a run of rl"):
        sft.run(small_recipe(out, "whole"), progress=QUIET)


def test_sampler_and_learner_agree_on_log_probabilities(tmp_path: Path) -> None:
    """The gap is at most 1e-3 in fp32, over turns with code and observations. Rewards are made up, so that every
    group is learnt from whatever the model answers."""
    recipe = small_recipe(tmp_path, "gap", run={"deterministic": False})
    runtime = load_runtime(recipe)
    tasks = open_source(recipe).train_tasks(0, 6)

    async def roll() -> list[TrajectoryGroup]:
        async with open_sandbox(recipe) as sandbox:
            return await run_groups(runtime.rollout(runtime.policy(), sandbox), tasks, 8, seed=0, step=0)

    groups = asyncio.run(roll())
    for group in groups:
        for i, trajectory in enumerate(group.trajectories):
            trajectory.reward = (-1.0) ** i
    assert sum(len(t.turns) > 1 for g in groups for t in g.trajectories) > 10
    metrics = trainer_of(runtime.model, {"prompts": 6, "micro_batch_tokens": 2000}).step(groups, 0, 0)
    assert 0 < metrics["training/rollout_logprob_gap_max"] <= 1e-3


def test_a_job_that_cannot_load_its_model_leaves_no_folder(tmp_path: Path) -> None:
    for run in (rl.run, sft.run, evaluate.run):
        with pytest.raises(UserError, match="nowhere"):
            run(small_recipe(tmp_path, "x", model={"path": "nowhere/at/all"}), progress=QUIET)
    assert list(tmp_path.iterdir()) == []
