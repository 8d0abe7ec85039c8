"""Muon against the singular value decomposition, and the schedules by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from retool.config import OptimConfig
from retool.engine.optim import Muon, lr_share, make_optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonalise_keeps_directions_and_evens_out_lengths(shape: tuple[int, int]) -> None:
    """The exact answer is U·Vᵀ of the SVD; five iterations bring every singular value into about 0.7 … 1.2."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    ours = orthogonalise(matrices)
    for matrix, result in zip(matrices, ours, strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        aligned = u.T @ result @ vh.T
        singular = torch.linalg.svdvals(result)
        assert singular.min() > 0.5
        assert singular.max() < 1.3
        torch.testing.assert_close(aligned, torch.diag(aligned.diagonal()), atol=1e-3, rtol=0)


def test_muons_first_step_by_hand() -> None:
    """From rest, momentum is 0.05·g and the look-ahead 0.05·0.95·g + 0.05·g, whose orthogonalisation is that of g."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    before, gradient = p.detach().clone(), torch.randn(6, 4)
    p.grad = gradient.clone()
    Muon([p], lr=0.1, weight_decay=0.5).step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * (6 / 4) ** 0.5 * orthogonalise(gradient[None])[0]
    torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=32, num_hidden_layers=2, **sizes))
    optimizers = make_optimizers(model, OptimConfig.model_validate({"name": name, "weight_decay": 0.1}))
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    embedding = id(model.get_input_embeddings().weight)
    for o in optimizers:
        for g in o.param_groups:
            if embedding in map(id, g["params"]):
                assert g["weight_decay"] == 0
                assert not isinstance(o, Muon)


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 0, 0.25),
        ("constant", 3, 1.0),
        ("constant", 23, 1.0),
        ("linear", 4, 1.0),
        ("linear", 14, 0.1 + 0.9 * 0.5),
        ("cosine", 14, 0.1 + 0.9 * 0.5),
        ("cosine", 9, 0.1 + 0.9 * (0.5 + 0.5 * 2**-0.5)),
        ("linear", 24, 0.1),
    ],
)
def test_schedules(schedule: str, step: int, share: float) -> None:
    """Four warm-up steps of 24; the fall goes to a tenth."""
    config = OptimConfig.model_validate({"warmup_steps": 4, "schedule": schedule, "final_lr_share": 0.1})
    assert lr_share(step, 24, config) == pytest.approx(share)
