"""Optimisers and schedules: AdamW, and Muon for small models trained from scratch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retool.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.95
NOT_HIDDEN = ("embed", "lm_head", "value_head")
"""Matrices that are no hidden layers: no weight decay, no Muon."""


def orthogonalise(matrices_KMN: Tensor) -> Tensor:
    """Push each matrix's singular values towards 1 by Newton–Schulz. In the input's own precision: on CPUs without fast
    bf16 the usual bf16 products are some hundred times slower than fp32."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x: Tensor = matrices_KMN.transpose(1, 2) if tall else matrices_KMN
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with Nesterov's look-ahead, for matrices only. Matrices of one
    shape are orthogonalised in one batch."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_same_shape(params, group["lr"], group["weight_decay"])

    def _step_same_shape(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        looks = []
        for p in params:
            assert p.grad is not None
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - MUON_MOMENTUM)
            looks.append(p.grad.lerp(momentum, MUON_MOMENTUM))
        rows, columns = params[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for p, update in zip(params, orthogonalise(torch.stack(looks)), strict=True):
            p.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)


class MasterWeights:
    """fp32 copies of trainable parameters that are held in half precision, for the optimiser to work on.

    In bf16 a weight keeps 8 bits: at a learning rate of 1e-6 nearly every update would be rounded away. Micro-batches'
    gradients are summed in fp32 too. Parameters in fp32 are their own masters, and nothing here costs anything.
    """

    def __init__(self, model: nn.Module):
        self.pairs = [
            (p, nn.Parameter(p.detach().float(), requires_grad=True))
            for p in model.parameters()
            if p.requires_grad and p.dtype != torch.float32
        ]
        self._of = {id(p): master for p, master in self.pairs}

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser holds in a parameter's place."""
        return self._of.get(id(parameter), parameter)

    @torch.no_grad()
    def collect(self) -> None:
        """After a backward pass: add the gradients to the masters'."""
        for p, master in self.pairs:
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After an optimiser step: round the masters into the model."""
        for p, master in self.pairs:
            p.copy_(master)

    def state(self) -> list[Tensor]:
        return [master.detach() for _, master in self.pairs]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        for (_, master), saved in zip(self.pairs, state, strict=True):
            master.copy_(saved)


def make_optimizers(
    model: nn.Module, config: OptimConfig, masters: MasterWeights | None = None
) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe; together they hold every trainable parameter, or its master, once.

    Vectors and embeddings get no weight decay."""
    masters = masters or MasterWeights(model)
    trainable = [(name, masters.of(p)) for name, p in model.named_parameters() if p.requires_grad]
    is_matrix = {name: p.ndim == 2 and not any(part in name for part in NOT_HIDDEN) for name, p in trainable}
    matrices = [p for name, p in trainable if is_matrix[name]]
    others = [p for name, p in trainable if not is_matrix[name]]
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": 1e-8}
    if config.name == "muon":
        found: list[torch.optim.Optimizer] = [Muon(matrices, config.muon_lr, config.weight_decay)]
        return [*found, torch.optim.AdamW(others, weight_decay=0.0, **adam)] if others else found
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW([group for group in groups if group["params"]], **adam)]


def lr_share(step: int, total: int, config: OptimConfig) -> float:
    """The share of the full learning rate at a step (counted from 0): a linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        fall = 1 - done
    elif config.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * done))
    else:
        return 1.0
    return config.final_lr_share + (1 - config.final_lr_share) * fall
