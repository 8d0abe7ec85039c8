"""The learner: log-probabilities of chosen tokens, and one optimiser step over micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retool.algo.batch import MicroBatch, Sample, loss_shares, micro_batches
from retool.algo.losses import nll
from retool.config import OptimConfig
from retool.engine.attention import SharedPrefix
from retool.engine.optim import MasterWeights, lr_share, make_optimizers

MAX_LOGITS = 16 * 1024 * 1024
"""Logits that exist at once (64 MB in fp32): a larger selection of tokens is computed in chunks and, where gradients
are wanted, each chunk's logits are made again in the backward pass."""


class Outputs(NamedTuple):
    """What a model says about a micro-batch's targets, ``[N]`` each, fp32."""

    logprobs_N: Tensor
    entropy_N: Tensor
    """Of the distribution that each target was drawn from, in nats."""


Forward = Callable[[Any, MicroBatch], Any]
"""``(model, batch) → outputs``, ``[N]`` tensors."""
Loss = Callable[[Any, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""``(outputs, batch) → (loss_N, values to log, [N] each)``."""


def supervised(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss for demonstrations and plain text."""
    return nll(outputs.logprobs_N), {}


def hidden_states(body: Any, batch: MicroBatch) -> Tensor:
    """The last hidden states from which a micro-batch's targets are predicted, ``[N, D]``."""
    prefix, (rows, length) = batch.prefix_P.shape[0], batch.ids_BT.shape
    device = batch.ids_BT.device
    row_positions = torch.arange(length, device=device) + prefix
    hidden = body(
        input_ids=torch.cat([batch.prefix_P, batch.ids_BT.reshape(-1)])[None],
        position_ids=torch.cat([torch.arange(prefix, device=device), row_positions.repeat(rows)])[None],
        attend=SharedPrefix(prefix, rows, length, device),
        use_cache=False,
    ).last_hidden_state[0]
    hidden_ND: Tensor = hidden[prefix + batch.source_N]
    return hidden_ND


def _chunk_logprobs(
    head: Any, hidden_ND: Tensor, target_N: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_ND).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    all_NV = logits_NV.log_softmax(-1)
    logprobs_N = all_NV.gather(1, target_N[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_N = -(all_NV.exp() * all_NV).sum(-1)
    return logprobs_N, entropy_N


def token_logprobs(
    model: Any, batch: MicroBatch, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> Outputs:
    """Log-probability and entropy at each target of a micro-batch. ``temperature`` must be the sampling policy's, else
    the ratio of policies is biased. The entropy carries a gradient where that is asked for."""
    hidden_ND = hidden_states(model.model, batch)
    head = model.get_output_embeddings()
    chunk = max(1, MAX_LOGITS // head.weight.shape[0])
    if hidden_ND.shape[0] <= chunk:
        return Outputs(*_chunk_logprobs(head, hidden_ND, batch.target_N, temperature, entropy_gradient))
    parts = [
        checkpoint(_chunk_logprobs, head, hidden, target, temperature, entropy_gradient, use_reentrant=False)
        for hidden, target in zip(hidden_ND.split(chunk), batch.target_N.split(chunk), strict=True)
    ]
    return Outputs(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


class Learner:
    """Holds the optimisers of one model and counts its updates.

    Args:
        model: its attention implementation is ours.
        config: the optimiser's section of the recipe.
        total_steps: for the schedule.
        micro_batch_tokens: computed tokens of one forward and backward pass at most.
        forward: what the losses get to see; by default ``token_logprobs`` at temperature 1.
    """

    def __init__(
        self,
        model: Any,
        config: OptimConfig,
        *,
        total_steps: int,
        micro_batch_tokens: int,
        forward: Forward = token_logprobs,
    ):
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.micro_batch_tokens = micro_batch_tokens
        self.forward = forward
        self.masters = MasterWeights(model)
        self.optimizers = make_optimizers(model, config, self.masters)
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step_count = 0

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def update(
        self,
        samples: Sequence[Sample],
        loss: Loss,
        *,
        aggregation: str = "token_mean",
        sequences: int = 0,
        max_tokens: int = 0,
    ) -> dict[str, float]:
        """One optimiser step. Each token's loss counts by its share (``loss_shares``, which explains the last three
        arguments), known before the first backward pass: how the batch is cut changes nothing.

        Returns:
            Token means of what ``loss`` asks to log (of names that end in ``max`` the maximum), and ``loss``,
            ``grad_norm``, ``lr``, ``tokens``. A step whose loss or gradients are not finite changes no weight and
            returns ``skipped`` = 1.
        """
        shares = loss_shares(samples, aggregation, sequences=sequences, max_tokens=max_tokens)
        batches = micro_batches(samples, self.micro_batch_tokens, shares)
        tokens = sum(len(b.target_N) for b in batches)
        total = 0.0
        sums: dict[str, float] = defaultdict(float)
        maxima: dict[str, float] = defaultdict(float)
        self.model.train()
        for batch in batches:
            batch = batch.to(self.device)
            loss_N, logged = loss(self.forward(self.model, batch), batch)
            share = (loss_N * batch.share_N).sum()
            share.backward()
            self.masters.collect()
            total += float(share.detach())
            for name, values_N in logged.items():
                if name.endswith("max"):
                    maxima[name] = max(maxima[name], float(values_N.max()))
                else:
                    sums[name] += float(values_N.sum())
        metrics = {name: value / max(1, tokens) for name, value in sums.items()} | maxima
        return metrics | {"loss": total, "tokens": float(tokens)} | self._apply()

    def _apply(self) -> dict[str, float]:
        params = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, self.config.grad_clip)
        finite = bool(torch.isfinite(norm))
        share = lr_share(self.step_count, self.total_steps, self.config)
        for optimizer, lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * share
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            self.masters.publish()
        self.step_count += 1
        return {"grad_norm": float(norm), "lr": self.config.lr * share, "skipped": float(not finite)}

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample], read: Callable[[Any], Tensor]) -> list[list[float]]:
        """For each sample one value a learnt token: what ``read`` takes from the outputs. Without learning."""
        self.model.eval()
        found: list[list[float]] = [[] for _ in samples]
        for batch in micro_batches(samples, self.micro_batch_tokens):
            batch = batch.to(self.device)
            values = read(self.forward(self.model, batch)).tolist()
            for row, value in zip(batch.row_N.tolist(), values, strict=True):
                found[batch.samples[row]].append(value)
        return found

    def evaluate_loss(self, samples: Sequence[Sample]) -> float:
        """Token mean of the negative log-likelihood, without learning."""
        logprobs = [value for values in self.evaluate(samples, lambda outputs: outputs.logprobs_N) for value in values]
        return -sum(logprobs) / max(1, len(logprobs))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "masters": self.masters.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step_count"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.masters.load(state["masters"])


def policy_forward(temperature: float, *, entropy_gradient: bool = False) -> Forward:
    """``token_logprobs`` at the temperature of the rollouts."""
    return partial(token_logprobs, temperature=temperature, entropy_gradient=entropy_gradient)
