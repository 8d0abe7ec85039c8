"""PPO's critic: the actor's architecture and weights, with a value head in the place of the vocabulary's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from retool.algo.batch import MicroBatch
from retool.engine.learner import hidden_states

RETURN_DECAY = 0.9
"""Of the running mean and variance of returns, a step."""

NO_SPREAD = 1e-4
"""A variance below this share of the mean square is none."""


class Critic(nn.Module):
    """How good the state before a token is.

    Returns are thought of as ``mean + std · x``: the head gives ``x``, and without ``update_scale`` mean and std stay 0
    and 1.
    """

    mean: Tensor
    std: Tensor
    steps: Tensor

    def __init__(self, actor: Any):
        """Starts as a copy of ``actor`` (its adapters included) that says 0 everywhere."""
        super().__init__()
        self.config = actor.config
        self.model = copy.deepcopy(actor.model)
        device = next(actor.parameters()).device
        self.value_head = nn.Linear(actor.config.hidden_size, 1, dtype=torch.float32, device=device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        for name, start in (("mean", 0.0), ("std", 1.0), ("steps", 0.0)):
            self.register_buffer(name, torch.tensor(start, device=device))

    @torch.no_grad()
    def update_scale(self, returns_N: Tensor) -> None:
        """Move mean and std towards those of a step's returns, and the head so that no value changes (PopArt,
        arXiv 1602.07714, section 2.2). The first time it does change them: a new head, which says 0, says the mean."""
        old_mean, old_std = self.mean.clone(), self.std.clone()
        keep = 1 - 1 / (self.steps + 1) if self.steps < 1 / (1 - RETURN_DECAY) else RETURN_DECAY
        self.steps += 1
        new_mean = keep * old_mean + (1 - keep) * returns_N.mean()
        second = keep * (old_std**2 + old_mean**2) + (1 - keep) * returns_N.square().mean()
        self.mean.copy_(new_mean)
        variance = second - new_mean**2
        if variance > NO_SPREAD * second:  # returns that are all alike say nothing about their scale
            self.std.copy_(variance.sqrt())
        if self.steps > 1:
            self.value_head.weight.mul_(old_std / self.std)
            self.value_head.bias.mul_(old_std / self.std).add_((old_mean - self.mean) / self.std)

    def learnt_state(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters, and the scale."""
        trained = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        return trained | {name: buffer for name, buffer in self.named_buffers() if name in ("mean", "std", "steps")}

    @torch.no_grad()
    def load_learnt_state(self, state: dict[str, Tensor]) -> None:
        """Raises KeyError: the state is another model's."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, saved in state.items():
            own[name].copy_(saved)


def token_values(critic: Critic, batch: MicroBatch) -> Tensor:
    """The critic's estimate before each target of a micro-batch was sampled, ``[N]``, fp32."""
    hidden_ND = hidden_states(critic.model, batch)
    values_N: Tensor = critic.value_head(hidden_ND.float())[:, 0] * critic.std + critic.mean
    return values_N
