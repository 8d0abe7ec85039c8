"""Loading and saving: the packaged model, random ones, and a user's mistakes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retool.config import ModelConfig
from retool.engine.model import NANO, load_model, save_model_aside
from retool.errors import UserError


def test_nano_is_small_and_loads_with_transformers_alone() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir() if file.is_file()) < 8_000_000
    model, tokenizer = load_model(ModelConfig(device="cpu"))
    plain = AutoModelForCausalLM.from_pretrained(NANO)
    for name, p in model.state_dict().items():
        assert torch.equal(p, plain.state_dict()[name])
    ids = tokenizer("What is 3 + 4?", return_tensors="pt")["input_ids"]
    assert plain(input_ids=ids).logits.shape[-1] >= len(tokenizer)


def test_a_saved_model_is_the_same_and_replaces_the_old_one(tmp_path: Path) -> None:
    model, tokenizer = load_model(
        ModelConfig(device="cpu", tokenizer="nano", random_init={"hidden_size": 16, "num_hidden_layers": 1})
    )
    for _ in range(2):
        save_model_aside(model, tokenizer, tmp_path / "saved")
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    again, tokenizer_again = load_model(ModelConfig(path=str(tmp_path / "saved"), device="cpu"))
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name])
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert model.config._attn_implementation == "retool"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ModelConfig(path="no/such/folder/here", device="cpu"), "no/such/folder/here"),
        (ModelConfig(tokenizer="no/such/folder/here", device="cpu"), "no/such/folder/here"),
        (ModelConfig(tokenizer="nano", random_init={"hidden_size": 20}, device="cpu"), "hidden_size = 20"),
        (ModelConfig(tokenizer="nano", random_init={"hiden_size": 16}, device="cpu"), "hiden_size"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(config: ModelConfig, field: str) -> None:
    with pytest.raises(UserError, match=field) as caught:
        load_model(config)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.device = 'cuda'"):
        load_model(ModelConfig(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_takes_bfloat16() -> None:
    model, _ = load_model(ModelConfig(device="auto"))
    assert next(model.parameters()).dtype is torch.bfloat16
    assert model.device.type == "cuda"
