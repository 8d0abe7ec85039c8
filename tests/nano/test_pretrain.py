"""The script that makes nano, for a few steps: what it leaves is a model that learns and that the jobs load."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from retool.config import ModelConfig
from retool.engine.model import NANO, load_model
from retool.nano.pretrain import pretrain, train_tokenizer
from retool.progress import Progress


def test_a_few_steps_make_a_model_of_the_same_kind(tmp_path: Path) -> None:
    found = pretrain(tmp_path / "nano", steps=4, seed=0, threads=1, progress=Progress(quiet=True))
    assert found["held_out_loss"] < 7.0  # a uniform guess has ln 1024 = 6.93
    model, tokenizer = load_model(ModelConfig(path=str(tmp_path / "nano"), device="cpu"))
    shipped = AutoModelForCausalLM.from_pretrained(NANO)
    assert found["parameters"] == sum(p.numel() for p in shipped.parameters())
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in shipped.state_dict().items()}
    assert tokenizer.chat_template


def test_the_shipped_tokenizer_is_the_one_that_the_script_makes() -> None:
    """So that the weights beside it can be what the model card says."""
    _, shipped = load_model(ModelConfig(device="cpu"))
    made = train_tokenizer(0)
    assert made.get_vocab() == shipped.get_vocab()
    text = "Count the prime numbers from 273 to 310."
    assert made.encode(text) == shipped.encode(text)
    assert made.chat_template == shipped.chat_template
