"""Adapters: what they compute, what they leave alone, and what of them other programs can read."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from retool.algo.batch import Sample, micro_batches
from retool.config import LoraConfig, OptimConfig
from retool.engine import lora
from retool.engine.learner import Learner, supervised, token_logprobs
from retool.engine.lora import (
    adapter_settings,
    add_lora,
    has_lora,
    is_adapter,
    load_adapter,
    merged_state_dict,
    save_adapter,
    without_lora,
)
from retool.engine.policy import LocalPolicy
from retool.errors import ConfigError, DataError, InvariantError
from retool.types import SamplingParams
from tests.engine.test_learner import CONFIGS, SIZES, make_model, make_samples

RANK = 4
LORA = LoraConfig(rank=RANK, alpha=8)
TIED = Qwen2Config(**SIZES, tie_word_embeddings=True)
KINDS = pytest.mark.parametrize("config", [*CONFIGS, TIED], ids=["qwen2", "qwen3", "llama", "tied"])
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def make(config: PreTrainedConfig, settings: LoraConfig = LORA, seed: int = 1) -> Any:
    model = make_model(copy.deepcopy(config))
    add_lora(model, settings, seed)
    return model


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    """Of all samples, as the learner computes them, with dropout off."""
    training = model.training
    model.eval()
    values = torch.cat([token_logprobs(model, b)[0] for b in micro_batches(make_samples(), 200)])
    model.train(training)
    return values


def train(model: Any, steps: int = 4) -> None:
    learner = Learner(model, OptimConfig(lr=2e-2), total_steps=steps, micro_batch_tokens=200)
    for _ in range(steps):
        assert learner.update(make_samples(), supervised)["grad_norm"] > 0


def weights(model: Any, *, adapters: bool) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if (".lora_" in n) == adapters}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@KINDS
def test_new_adapters_change_nothing_and_are_all_that_is_trained(config: PreTrainedConfig) -> None:
    plain = make_model(copy.deepcopy(config))
    model = make(config)
    assert has_lora(model) and not has_lora(plain)
    assert type(model) is type(plain)
    assert torch.equal(logprobs(model), logprobs(plain))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == weights(model, adapters=True).keys()
    linear = [m for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert len(linear) == 2 * len(PROJECTIONS)
    expected = sum(RANK * (m.in_features + m.out_features) for m in linear)
    assert sum(p.numel() for p in trainable.values()) == expected


@KINDS
def test_after_training(config: PreTrainedConfig, tmp_path: Path) -> None:
    plain = make_model(copy.deepcopy(config))
    model = make(config)
    base, adapters = weights(model, adapters=False), weights(model, adapters=True)
    before = logprobs(plain)
    train(model)

    assert equal(weights(model, adapters=False), base)
    changed = weights(model, adapters=True)
    assert not any(torch.equal(changed[name], adapters[name]) for name in adapters)
    learnt = logprobs(model)
    assert (learnt - before).abs().max() > 0.1
    with without_lora(model):
        assert torch.equal(logprobs(model), before)
    assert torch.equal(logprobs(model), learnt)

    merged = merged_state_dict(model)
    assert list(merged) == list(plain.state_dict())
    assert equal(weights(model, adapters=False), base) and equal(weights(model, adapters=True), changed)
    plain.load_state_dict(merged)
    assert (logprobs(plain) - learnt).abs().max() <= 1e-5
    # what a checkpoint is made of
    model.save_pretrained(tmp_path, state_dict=merged_state_dict(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="retool")
    assert type(loaded) is type(plain) and not has_lora(loaded)
    assert equal(dict(loaded.state_dict()), dict(plain.state_dict()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == config.tie_word_embeddings


@KINDS
def test_saved_adapters_are_pefts_own_and_load_bit_by_bit(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = make(config)
    train(model)
    assert not is_adapter(tmp_path)
    save_adapter(model, tmp_path, "org/base")
    assert is_adapter(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    other = make(config, seed=2)
    held = [p for p in other.parameters() if p.requires_grad]
    assert not equal(weights(other, adapters=True), weights(model, adapters=True))
    load_adapter(other, tmp_path)
    assert equal(weights(other, adapters=True), weights(model, adapters=True))
    assert all(a is b for a, b in zip(held, (p for p in other.parameters() if p.requires_grad), strict=True))
    assert torch.equal(logprobs(other), logprobs(model))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft only warns of weights that it misses
        wrapped = peft.PeftModel.from_pretrained(make_model(copy.deepcopy(config)), tmp_path)
    wrapped.config._attn_implementation = model.config._attn_implementation = "sdpa"
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        difference = wrapped(input_ids=ids).logits - model.eval()(input_ids=ids).logits
    assert difference.abs().max() <= 1e-5


def test_saved_files_are_the_same_bytes_and_tell_their_settings(tmp_path: Path) -> None:
    settings = LoraConfig(rank=3, alpha=5.5, dropout=0.25, targets=["v_proj", "q_proj"])
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        save_adapter(make(CONFIGS[0], settings), folder, "org/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    written = json.loads((folders[0] / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["inference_mode"] is True and written["base_model_name_or_path"] == "org/base"
    base, read = adapter_settings(folders[0])
    assert base == "org/base"
    assert read == settings.model_copy(update={"targets": ["q_proj", "v_proj"]})
    load_adapter(make(CONFIGS[0], read), folders[0])


def test_transformers_finds_base_and_adapter_by_the_folder_alone(tmp_path: Path) -> None:
    model = make(CONFIGS[1])
    make_model(copy.deepcopy(CONFIGS[1])).save_pretrained(tmp_path / "base")
    train(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="retool")
    assert has_lora(loaded) and type(loaded) is type(model)
    assert (logprobs(loaded) - logprobs(model)).abs().max() <= 1e-5


def test_without_lora_restores_what_was() -> None:
    model = make(CONFIGS[0])
    train(model)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    state = [p.requires_grad for p in model.parameters()]
    learnt = logprobs(model)
    with pytest.raises(RuntimeError, match="inside"), without_lora(model):
        raise RuntimeError("inside")
    assert [p.requires_grad for p in model.parameters()] == state
    assert torch.equal(logprobs(model), learnt)
    with without_lora(model):
        with without_lora(model):
            base = logprobs(model)
        assert torch.equal(logprobs(model), base)  # the inner one did not switch them on
    assert not torch.equal(base, learnt)
    assert torch.equal(logprobs(model), learnt)
    with without_lora(plain := make_model(CONFIGS[0])):
        assert torch.equal(logprobs(plain), base)


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradients() -> None:
    def gradients(reference: bool) -> list[Tensor]:
        model = make(CONFIGS[0])
        train(model, steps=1)
        model.zero_grad()
        (batch,) = micro_batches(make_samples(), 10_000)
        values = token_logprobs(model, batch)[0]
        if reference:
            with torch.no_grad(), without_lora(model):
                token_logprobs(model, batch)
        values.sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(False)
    assert all(g is not None and g.abs().sum() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_the_sampler_agrees_with_the_learner(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = make_model(copy.deepcopy(config)).to(dtype)
    add_lora(model, LoraConfig(rank=RANK, alpha=8, dropout=0.3), 1)
    policy = LocalPolicy(model, decode=str, max_context=96, kv_budget_mb=8, max_live=4, prefill_chunk=16)
    prompts = [[*range(10, 30), i] for i in range(4)]

    async def turn() -> list[Sample]:
        calls = [
            policy.generate(p, SamplingParams(max_tokens=20, seed=i), session=str(i)) for i, p in enumerate(prompts)
        ]
        samples = []
        for i, output in enumerate(await asyncio.gather(*calls)):
            policy.release(str(i))
            n, m = len(prompts[i]), len(output.token_ids)
            ids, old = prompts[i] + output.token_ids, [0.0] * n + output.logprobs
            samples.append(Sample(ids, [0] * n + [1] * m, old, 1.0))
        return samples

    def difference(samples: list[Sample]) -> float:
        model.eval()
        with torch.no_grad():
            return max(
                float((token_logprobs(model, b)[0] - b.old_logprobs_N).abs().max()) for b in micro_batches(samples, 200)
            )

    # bfloat16 has 8 bits; the two passes round their sums in different places
    bound = 1e-4 if dtype == torch.float32 else 0.25
    first = asyncio.run(turn())
    assert difference(first) <= bound
    train(model)
    assert difference(first) > bound  # the adapters matter
    policy.weights_updated()
    assert difference(asyncio.run(turn())) <= bound


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_a_bf16_base_has_fp32_adapters(config: PreTrainedConfig, tmp_path: Path) -> None:
    plain = make_model(copy.deepcopy(config)).to(torch.bfloat16)
    model = copy.deepcopy(plain)
    add_lora(model, LORA, 1)
    assert {p.dtype for p in weights(model, adapters=True).values()} == {torch.float32}
    assert {p.dtype for p in weights(model, adapters=False).values()} == {torch.bfloat16}
    # the same as under an fp32 base, bit by bit
    assert equal(weights(model, adapters=True), weights(make(config), adapters=True))
    before = logprobs(plain)
    assert torch.equal(logprobs(model), before)
    train(model)
    learnt = logprobs(model)
    assert (learnt - before).abs().mean() > 0.05
    with without_lora(model):
        assert torch.equal(logprobs(model), before)

    save_adapter(model, tmp_path, "base")
    other = copy.deepcopy(plain)
    add_lora(other, LORA, 2)
    load_adapter(other, tmp_path)
    assert torch.equal(logprobs(other), learnt)

    merged = merged_state_dict(model)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    layer = model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.float() + LORA.alpha / RANK * b @ a
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], expected.to(torch.bfloat16))
    plain.load_state_dict(merged)
    assert (logprobs(plain) - learnt).abs().mean() < (learnt - before).abs().mean() / 2


def test_the_seed_is_all_the_randomness() -> None:
    plain = make_model(CONFIGS[0])
    state = torch.get_rng_state()
    models = [copy.deepcopy(plain) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LORA, seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        state = torch.get_rng_state()
    first, same, other = (weights(model, adapters=True) for model in models)
    assert equal(first, same)
    for name, value in first.items():
        if "lora_A" in name:
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5  # uniform, as Kaiming's rule for a = √5
            assert bound * 0.8 < value.abs().max() <= bound
        else:
            assert not value.any()
    layers = [value for name, value in first.items() if "q_proj.lora_A" in name]
    assert not torch.equal(*layers)


def test_dropout_is_for_training_only() -> None:
    settings = LoraConfig(rank=RANK, alpha=8, dropout=0.5)
    model = make_model(CONFIGS[0]).eval()
    add_lora(model, settings, 1)
    assert not any(m.training for m in model.modules())
    train(model)
    assert all(m.training for m in model.modules())
    (batch,) = micro_batches(make_samples(), 10_000)

    def values() -> Tensor:
        with torch.no_grad():
            return token_logprobs(model, batch)[0]

    torch.manual_seed(0)
    assert not torch.equal(values(), values())
    merged = merged_state_dict(model)
    with without_lora(model):
        assert torch.equal(values(), values())
    model.eval()
    assert torch.equal(values(), values())
    assert equal(merged, merged_state_dict(model))
    plain = make_model(CONFIGS[0])
    plain.load_state_dict(merged)
    assert (logprobs(plain) - logprobs(model)).abs().max() <= 1e-5


def test_chosen_targets_and_an_untied_head() -> None:
    settings = LoraConfig(rank=2, alpha=4, targets=["q_proj", "model.layers.1.mlp.up_proj", "lm_head"])
    model = make(CONFIGS[2], settings)
    adapted = {n.partition(".lora_")[0] for n in weights(model, adapters=True)}
    attention = {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert adapted == attention | {"model.layers.1.mlp.up_proj", "lm_head"}
    train(model)
    plain = make_model(CONFIGS[2])
    plain.load_state_dict(merged_state_dict(model, torch.device("cpu")))
    assert (logprobs(plain) - logprobs(model)).abs().max() <= 1e-5
    both = make(CONFIGS[2], LoraConfig(rank=2, targets=["all-linear", "lm_head"]))
    assert len(weights(both, adapters=True)) == 2 * (2 * len(PROJECTIONS) + 1)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["q_proj", "q_prj"], f"no linear layer is named 'q_prj'; this model's are {', '.join(PROJECTIONS)}, and "),
        (["embed_tokens"], "no linear layer is named 'embed_tokens'; "),
        (["mlp"], "no linear layer is named 'mlp'; "),
        (["proj"], "no linear layer is named 'proj'; "),
        (["lm_head"], "'lm_head' shares its weights with the input embeddings, "),
    ],
)
def test_a_wrong_target_is_one_line_and_leaves_the_model_alone(targets: list[str], reason: str) -> None:
    model = make_model(copy.deepcopy(TIED))
    with pytest.raises(ConfigError) as caught:
        add_lora(model, LoraConfig(rank=2, targets=targets), 0)
    assert str(caught.value).startswith(f"model.lora.targets = {targets!r}: {reason}")
    assert "\n" not in str(caught.value)
    assert not has_lora(model) and all(p.requires_grad for p in model.parameters())
    add_lora(model, LORA, 0)


def test_misuse_is_a_broken_promise() -> None:
    with pytest.raises(InvariantError):
        add_lora(make_model(CONFIGS[0]), LoraConfig(rank=0), 0)
    with pytest.raises(InvariantError):
        add_lora(make(CONFIGS[0]), LORA, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 5}, "model.lora.rank = 5: the adapter in {folder} has 4; set it to that"),
        ({"alpha": 16}, "model.lora.alpha = 16: the adapter in {folder} has 8.0; set it to that"),
        ({"targets": ["q_proj"]}, "model.lora.targets = ['q_proj']: the adapter in {folder} is for "),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(make(CONFIGS[0]), tmp_path, "base")
    model = make(CONFIGS[0], LORA.model_copy(update=changes))
    before = weights(model, adapters=True)
    with pytest.raises(ConfigError) as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value).startswith(message.format(folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert equal(weights(model, adapters=True), before)


def test_an_adapter_of_another_model_is_one_line(tmp_path: Path) -> None:
    save_adapter(make(CONFIGS[0]), tmp_path, "base")
    wider = make(Qwen2Config(**{**SIZES, "hidden_size": 64}))
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets = .*use the model\.path"):
        load_adapter(wider, tmp_path)


def test_broken_folders_are_one_line(tmp_path: Path) -> None:
    model = make(CONFIGS[0])
    with pytest.raises(DataError, match=lora.CONFIG_FILE):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "base")
    settings = json.loads((tmp_path / lora.CONFIG_FILE).read_text())
    whole = (tmp_path / lora.WEIGHTS_FILE).read_bytes()
    for weights_file in (whole[:100], b"", None):
        (tmp_path / lora.WEIGHTS_FILE).unlink()
        if weights_file is not None:
            (tmp_path / lora.WEIGHTS_FILE).write_bytes(weights_file)
        else:
            (tmp_path / lora.WEIGHTS_FILE).mkdir()
        with pytest.raises(DataError, match=rf"{lora.WEIGHTS_FILE}: cannot be read") as caught:
            load_adapter(model, tmp_path)
        assert "\n" not in str(caught.value)
    for text, reason in (
        ("{", "no adapter's settings"),
        ("[]", "no adapter's settings"),
        ("{}", "no adapter's settings"),
        (json.dumps(settings | {"r": "many"}), "no adapter's settings"),
        (json.dumps(settings | {"target_modules": None}), "no adapter's settings"),
        (json.dumps(settings | {"use_dora": True}), "plain LoRA only, and this adapter has use_dora"),
        (
            json.dumps(settings | {"alpha_pattern": {"q_proj": 3}}),
            "plain LoRA only, and this adapter has alpha_pattern",
        ),
        (
            json.dumps(settings | {"init_lora_weights": "pissa"}),
            "plain LoRA only, and this adapter has init_lora_weights",
        ),
        (json.dumps(settings | {"peft_type": "IA3"}), "plain LoRA only, and this adapter has IA3"),
    ):
        (tmp_path / lora.CONFIG_FILE).write_text(text)
        with pytest.raises(DataError, match=reason) as caught:
            adapter_settings(tmp_path)
        assert "\n" not in str(caught.value)
