"""What --dry-run says: sizes against the real models, the shipped recipes against the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from retool.config import SHIPPED_RECIPES, Recipe, load_recipe, make_recipe, recipe_path
from retool.engine import learner
from retool.engine.kv import bytes_per_token
from retool.errors import ConfigError
from retool.memory import (
    ACTIVATIONS,
    MAX_LOGITS,
    Architecture,
    Shape,
    estimate_memory,
    estimate_phases,
    shapes,
)
from retool.plan import KNOWN, Machine, make_plan, read_architecture, render

CPU, GPU = Machine("cpu", 24.0), Machine("a GPU", 80.0)
SHIPPED = [path.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix() for path in SHIPPED_RECIPES.rglob("*.toml")]
FOLDERS = [name for name in SHIPPED if "/" in name]


def job_of(name: str) -> str:
    return "sft" if name.endswith("/sft") else "rl"


def plan_of(name: str, *overrides: str, machine: Machine = CPU) -> Any:
    return make_plan(job_of(name), load_recipe(recipe_path(name), overrides), machine=machine)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.544),
        ("Qwen/Qwen2.5-3B-Instruct", 3.086),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen2.5-14B-Instruct", 14.770),
        ("Qwen/Qwen2.5-32B-Instruct", 32.764),
        ("Qwen/Qwen2.5-72B-Instruct", 72.706),
        ("Qwen/Qwen3-4B", 4.022),
        ("Qwen/Qwen3-8B", 8.191),
    ],
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    """The sums of the published checkpoints' tensors, in billions."""
    assert KNOWN[name].parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
             "intermediate_size": 200, "vocab_size": 777, "tie_word_embeddings": tied}  # fmt: skip
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(Qwen2Config(**sizes))
        qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32))
    assert Architecture(**sizes).parameters == qwen2.num_parameters()
    assert Architecture(**sizes, head_dim=32, qk_norm=True).parameters == qwen3.num_parameters()
    assert Architecture(**sizes).kv_numbers * 4 == bytes_per_token(qwen2.config, torch.float32)
    assert MAX_LOGITS == learner.MAX_LOGITS


def test_the_model_is_read_where_it_is(tmp_path: Path, shared_data: Path) -> None:
    nano = read_architecture(Recipe())
    assert nano is not None and nano.parameters == 722_560
    assert read_architecture(make_recipe({"model": {"path": str(tmp_path)}})) is None
    assert read_architecture(make_recipe({"model": {"path": "nobody/nothing"}})) is None
    config = {"model_type": "qwen3", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
              "num_key_value_heads": 2, "intermediate_size": 200, "vocab_size": 777, "head_dim": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_architecture(make_recipe({"model": {"path": str(tmp_path)}}))
    assert found == Architecture(96, 3, 6, 2, 200, 777, False, 32, True)
    random = {"tokenizer": str(shared_data / "tokenizer" / "qwen2.5"), "random_init": {"hidden_size": 64}}
    found = read_architecture(make_recipe({"model": random}))
    assert found is not None and found.vocab_size == 151_665


SMALL = Architecture(64, 3, 4, 2, 160, 1000, True)
TUNED = {
    "rl": {"micro_batch_tokens": 512, "group_size": 4},
    "rollout": {"max_context": 400, "max_response_tokens": 300},
}


def learning(architecture: Architecture = SMALL, *, gpu: bool = False, job: str = "rl", **sections: Any) -> Any:
    """The parts of the learning phase, in bytes."""
    recipe = make_recipe({name: TUNED.get(name, {}) | sections.get(name, {}) for name in {*TUNED, *sections}})
    return {n: gb * 2**30 for n, gb in estimate_phases(job, recipe, architecture, gpu=gpu)["learning"].items()}


def test_memory_by_part() -> None:
    """By hand, for Qwen2.5-7B in bf16: 2 bytes a weight, 4 its master's, 4 its gradient's, 8 its moments'."""
    architecture = KNOWN["Qwen/Qwen2.5-7B-Instruct"]
    recipe = load_recipe(recipe_path("qwen2.5-7b/grpo"))
    parts = estimate_phases("rl", recipe, architecture, gpu=True)["learning"]
    weights = 7_615_616_512 * 2 / 2**30
    assert parts["weights"] == pytest.approx(weights)
    assert parts["master weights (fp32)"] == parts["gradients"] == pytest.approx(2 * weights)
    assert parts["optimiser (adamw)"] == pytest.approx(4 * weights)
    # 28 layers × 2 (keys, values) × 4 heads × 128 wide × 2 bytes = 57,344 bytes a token; the budget is smaller.
    assert architecture.kv_numbers * 2 == 57_344
    assert parts["KV cache"] == 64
    on_cpu = estimate_phases("rl", recipe, architecture, gpu=False)["learning"]
    assert on_cpu["weights"] == on_cpu["gradients"] == pytest.approx(2 * weights)
    assert "master weights (fp32)" not in on_cpu
    evaluation = estimate_memory("evaluate", recipe, architecture, gpu=True)
    assert set(evaluation) == {"weights", "KV cache", "sampling"}
    small = estimate_memory("evaluate", load_recipe(recipe_path("quickstart")), read_architecture(Recipe()), gpu=False)  # type: ignore[arg-type]
    assert small["KV cache"] == pytest.approx(256 * 448 * 1536 / 2**30)  # 256 live × 448 tokens × 1,536 bytes


def test_muons_embeddings_are_adamws() -> None:
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    muon = learning(rl={"optim": {"name": "muon"}})
    assert muon["optimiser (muon)"] == 4 * (matrices + 2 * (SMALL.parameters - matrices))
    assert learning()["optimiser (adamw)"] == 8 * SMALL.parameters


def test_adapters_learn_alone() -> None:
    adapters = 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    parts = learning(gpu=True, model={"lora": {"rank": 8}}, rl={"kl": {"place": "loss"}})
    assert parts["weights"] == 2 * SMALL.parameters + 4 * adapters
    assert parts["gradients"] == 4 * adapters and parts["optimiser (adamw)"] == 8 * adapters
    assert "master weights (fp32)" not in parts and "reference (KL)" not in parts
    some = learning(gpu=True, model={"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}})
    assert some["gradients"] == 4 * 3 * 8 * (64 + 64 + 64 + 32)
    assert some[ACTIVATIONS] < parts[ACTIVATIONS]


def test_a_critic_and_a_reference() -> None:
    """The critic has the body with its embeddings, and no gradients while the actor has some."""
    untied = Architecture(64, 3, 4, 2, 160, 1000, False)
    critic = learning(untied, gpu=True, rl={"algorithm": "ppo"})["critic (weights, optimiser)"]
    assert critic == (2 + 4 + 8) * (untied.parameters - 64_000)
    assert learning(rl={"algorithm": "ppo"})["critic (weights, optimiser)"] == (4 + 8) * SMALL.parameters
    assert learning(gpu=True, rl={"kl": {"place": "reward"}})["reference (KL)"] == 2 * SMALL.parameters


def test_shapes_of_micro_batches() -> None:
    recipe = make_recipe(TUNED)
    # One row of any length; a prompt of 100 tokens and two rows of 206, or a group of four.
    assert set(shapes("rl", recipe)) == {Shape(0, 1, 400), Shape(100, 2, 206), Shape(100, 4, 103)}
    assert Shape(100, 2, 206).tokens == 512 and Shape(100, 2, 206).mask == 206 * 306 and Shape(0, 1, 400).mask == 0
    sft = make_recipe({"sft": {"micro_batch_tokens": 300, "max_tokens": 1000}})
    assert set(shapes("sft", sft)) == {Shape(0, 1, 1000), Shape(1, 2, 149)}  # longer than the micro-batch
    short = make_recipe({"sft": {"micro_batch_tokens": 1001, "max_tokens": 101}})
    assert Shape(1, 10, 100) in shapes("sft", short)


def test_checkpointing_keeps_hidden_states() -> None:
    """One row of 400 tokens, in fp32: 6 × hidden + 4 × heads + 4 × feed-forward numbers a token and layer, and 5 ×
    hidden besides; with checkpointing the hidden states alone, and one layer's."""
    model = Architecture(64, 30, 4, 2, 160, 100_000, True)
    one_row = {"rl": {"micro_batch_tokens": 100}}
    tokens, layer = 400, 4 * (6 * 64 + 4 * 64 + 4 * 160)
    whole = learning(model, **one_row)
    assert whole[ACTIVATIONS] == tokens * (30 * layer + 4 * 5 * 64)
    again = learning(model, engine={"gradient_checkpointing": True}, **one_row)
    assert again[ACTIVATIONS] == tokens * 4 * (30 + 5) * 64
    half = learning(model, gpu=True, **one_row)  # norms work in fp32
    assert half[ACTIVATIONS] == tokens * (30 * (2 * 64 * (4 + 2 + 2) + 2 * 4 * (64 + 160)) + 2 * 5 * 64)
    assert whole["logits"] == 4 * 4 * MAX_LOGITS
    wide = learning(Architecture(512, 30, 4, 2, 160, 100_000, True), **one_row)
    assert wide["logits"] == 3 * 4 * MAX_LOGITS + 2 * 4 * 512 * 100_000  # two copies of the head's gradient


def test_the_peak_is_that_of_the_largest_phase() -> None:
    recipe = make_recipe({**TUNED, "rl": {**TUNED["rl"], "eval_every": 5}, "engine": {"kv_budget_mb": 64}})
    phases = estimate_phases("rl", recipe, SMALL, gpu=False)
    assert set(phases) == {"learning", "rollout"}
    # The store of the rollout stays while the engine learns; an evaluation uses it too.
    assert phases["learning"]["KV cache"] == phases["rollout"]["KV cache"] == 64 / 1024
    assert estimate_memory("rl", recipe, SMALL, gpu=False) == max(phases.values(), key=lambda x: sum(x.values()))


def test_the_estimate_is_near_what_a_step_takes() -> None:
    """One small case of the benchmark, measured."""
    script = Path(__file__).parent.parent / "benchmarks" / "memory_plan.py"
    run = subprocess.run([sys.executable, script, "--one", "small"], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert 0.7 < sum(found["parts"].values()) / found["taken"] < 1.3


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_has_a_plan(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETOOL_DATA", str(shared_data))
    plan = plan_of(name)
    shown = render(plan)
    assert plan.total_gb > 0
    assert "fits this machine (cpu, 24.0 GiB): " in shown and "steps" in shown
    assert recipe_path(f"{name}.toml") == recipe_path(name) == recipe_path(f"recipes/{name}")


def test_the_one_gpu_recipes_fit_one_gpu() -> None:
    again, small = "engine.gradient_checkpointing=true", Machine("a GPU", 24.0)
    for name in (name for name in FOLDERS if "1gpu" in name):
        assert "fits this machine (a GPU, 80.0 GiB): yes" in render(plan_of(name, again, machine=GPU)), name
    adapters = (again, "model.lora.rank=32")
    for name in (name for name in FOLDERS if "1gpu" in name and "dapo" not in name):
        assert "fits this machine (a GPU, 24.0 GiB): yes" in render(plan_of(name, *adapters, machine=small)), name


REFERENCE: dict[str, dict[str, Any]] = {
    # verl's ReTool recipe for Qwen2.5-32B (DESIGN's table of figures).
    "qwen2.5-32b/sft": {
        "model.path": "Qwen/Qwen2.5-32B-Instruct", "data.train": "retool-sft", "sft.epochs": 6, "sft.batch_size": 32,
        "sft.max_tokens": 16384, "sft.steps": 0,
    },
    "qwen2.5-32b/grpo": {
        "data.train": "dapo-math-17k", "data.test": "aime-2025", "rl.algorithm": "grpo", "rl.steps": 150,
        "rl.prompts": 512, "rl.minibatch_prompts": 64, "rl.group_size": 16, "rl.clip_low": 0.2, "rl.clip_high": 0.28,
        "rl.dual_clip": 10.0, "rl.optim.lr": 1e-6, "rl.reward": "verl", "rl.eval_every": 5, "rollout.max_turns": 8,
        "rollout.max_response_tokens": 16384, "rollout.max_context": 18432, "rollout.temperature": 1.0,
        "rollout.top_p": 1.0, "rollout.top_k": 0, "eval.k": 30, "eval.top_p": 0.6, "eval.temperature": 1.0,
        "rl.eval_split": "test", "rl.eval_size": 30,
    },
    "qwen2.5-32b/ppo": {
        "data.train": "dapo-math-17k", "data.test": "aime-2025", "rl.algorithm": "ppo", "rl.steps": 250,
        "rl.prompts": 1024, "rl.minibatch_prompts": 256, "rl.group_size": 1, "rl.critic.optim.lr": 2e-6,
        "rl.critic.gamma": 1.0, "rl.critic.lam": 1.0, "rl.critic.warmup_steps": 19, "rl.optim.lr": 1e-6,
        "rollout.max_turns": 8, "eval.k": 30, "eval.top_p": 0.6,
    },
    "qwen2.5-7b/grpo": {
        "model.path": "Qwen/Qwen2.5-7B-Instruct", "rl.prompts": 64, "rl.group_size": 16, "rollout.max_turns": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETOOL_START", raising=False)
    recipe = load_recipe(recipe_path(name))
    for key, expected in REFERENCE[name].items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected, key


def test_counts_come_from_the_files_where_they_are(shared_data: Path) -> None:
    file = f"data.train_file={shared_data / 'dapo' / 'dapo_math_17k.parquet'}"
    test = f"data.test_file={shared_data / 'aime' / 'aime_2025.jsonl'}"
    facts = dict(plan_of("qwen2.5-32b/grpo", file, test).facts)
    assert "17,917 rows" in facts["train on"] and "30 rows" in facts["evaluate on"]
    assert "as published" in dict(plan_of("qwen2.5-32b/grpo").facts)["train on"]
    facts = dict(plan_of("qwen2.5-32b/grpo", "data.train=some/where", "data.against=[]").facts)
    assert "rows not counted (some/where: not at hand)" in facts["train on"] and "less what is in" not in facts


def test_steps_of_epochs_are_counted() -> None:
    """2,000 rows less the held-out tenth: 1,800 × 6 / 32 = 337.5."""
    assert "338 (6 epochs" in dict(plan_of("qwen2.5-32b/sft").facts)["steps"]
    assert dict(plan_of("qwen2.5-32b/sft", "sft.steps=7").facts)["steps"].startswith("7, 32 conversations")
    assert "as many as 6 × the data need" in dict(plan_of("qwen2.5-32b/sft", "data.train=a/b").facts)["steps"]


def test_an_rl_plan_says_what_is_run() -> None:
    facts = dict(plan_of("qwen2.5-32b/ppo", "model.lora.rank=16", "rl.kl.place=reward").facts)
    assert facts["algorithm"] == "ppo: advantage gae, loss ppo_clip, token_mean"
    assert facts["LoRA"] == "rank 16 on all-linear" and "alone for 19 steps" in facts["critic"]
    assert facts["KL penalty"] == "in the reward, 0.001 × k3"
    overrides = ("rl.algorithm=dapo", "rl.dynamic_sampling.enabled=true", "rl.dynamic_sampling.max_rounds=3")
    facts = dict(plan_of("qwen2.5-7b/grpo", *overrides).facts)
    assert "at most 3 rounds, 3,072 trajectories a step" in facts["dynamic sampling"]  # 3 × 64 × 16
    assert facts["algorithm"].startswith("dapo: advantage grpo") and "critic" not in facts
    response = load_recipe(recipe_path("qwen2.5-7b/grpo")).rollout.max_response_tokens
    assert facts["tokens a step"] == f"at most {3072 * response:,} sampled and observed"


def test_the_split_that_is_evaluated() -> None:
    """In training ``rl.eval_split``, in an evaluation ``data.test_split``."""
    facts = dict(plan_of("qwen2.5-32b/grpo", "rl.eval_split=dev").facts)
    assert facts["evaluate on"].startswith("dapo-math-17k, dev: ") and "last tenth" in facts["evaluate on"]
    assert dict(plan_of("qwen2.5-32b/grpo", "rl.eval_split=test").facts)["evaluate on"].startswith(
        "aime-2025, test: 30"
    )
    recipe = load_recipe(recipe_path("qwen2.5-32b/grpo"), ("data.test_split=dev",))
    assert dict(make_plan("evaluate", recipe, machine=CPU).facts)["evaluate on"].startswith("dapo-math-17k, dev: ")


def test_a_model_that_is_not_at_hand_has_a_plan_without_memory() -> None:
    for path in ("nobody/nothing", "a b/c", "nobody/no/thing"):
        shown = render(plan_of("qwen2.5-32b/grpo", f"model.path={path}"))
        assert "its size is not at hand" in shown and "memory: not known" in shown


def test_an_unknown_recipe_names_the_others() -> None:
    with pytest.raises(ConfigError, match=r"qwen2\.5-32b/grpo, qwen2\.5-32b/ppo"):
        recipe_path("qwen2.5-32b/gppo")
