"""The learner: log-probabilities of chosen tokens, and one optimiser step over micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retool.algo.batch import MicroBatch, Sample, micro_batches
from retool.algo.losses import nll
from retool.config import OptimConfig
from retool.engine.attention import SharedPrefix
from retool.engine.optim import lr_share, make_optimizers

MAX_LOGITS = 16 * 1024 * 1024
"""Logits that exist at once (64 MB in fp32): a larger selection of tokens is computed in chunks and, where gradients
are wanted, each chunk's logits are made again in the backward pass."""

Loss = Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""``(logprobs_N, batch) → (loss_N, values to log, [N] each)``."""


def supervised(logprobs_N: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss for demonstrations and plain text."""
    return nll(logprobs_N), {}


def _chunk_logprobs(head: Any, hidden_ND: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_ND).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    all_NV = logits_NV.log_softmax(-1)
    logprobs_N = all_NV.gather(1, target_N[:, None])[:, 0]
    with torch.no_grad():
        entropy_N = -(all_NV.exp() * all_NV).sum(-1)
    return logprobs_N, entropy_N


def token_logprobs(model: Any, batch: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each target of a micro-batch: ``(logprobs_N, entropy_N)``, fp32; the entropy
    carries no gradient. ``temperature`` must be the sampling policy's, else the ratio of policies is biased."""
    prefix, (rows, length) = batch.prefix_P.shape[0], batch.ids_BT.shape
    device = batch.ids_BT.device
    row_positions = torch.arange(length, device=device) + prefix
    hidden = model.model(
        input_ids=torch.cat([batch.prefix_P, batch.ids_BT.reshape(-1)])[None],
        position_ids=torch.cat([torch.arange(prefix, device=device), row_positions.repeat(rows)])[None],
        attend=SharedPrefix(prefix, rows, length, device),
        use_cache=False,
    ).last_hidden_state[0]
    hidden_ND = hidden[prefix + batch.source_N]
    head = model.get_output_embeddings()
    chunk = max(1, MAX_LOGITS // head.weight.shape[0])
    if hidden_ND.shape[0] <= chunk:
        return _chunk_logprobs(head, hidden_ND, batch.target_N, temperature)
    parts = [
        checkpoint(_chunk_logprobs, head, hidden, target, temperature, use_reentrant=False)
        for hidden, target in zip(hidden_ND.split(chunk), batch.target_N.split(chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class Learner:
    """Holds the optimisers of one model and counts its updates.

    Args:
        model: a causal language model whose attention implementation is ours.
        config: the optimiser's section of the recipe.
        total_steps: for the schedule.
        micro_batch_tokens: computed tokens of one forward and backward pass at most.
    """

    def __init__(self, model: Any, config: OptimConfig, *, total_steps: int, micro_batch_tokens: int):
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizers = make_optimizers(model, config)
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step_count = 0

    def update(self, samples: list[Sample], loss: Loss, *, temperature: float = 1.0) -> dict[str, float]:
        """One optimiser step. The loss is ``Σ loss_N / M``, M the number of learnt tokens of the whole batch, known
        before the first backward pass: how the batch is cut changes nothing.

        Returns:
            Token means of what ``loss`` asks to log, and ``loss``, ``entropy``, ``grad_norm``, ``lr``, ``tokens``. A
            step whose gradients are not finite changes no weight and returns ``skipped`` = 1.
        """
        batches = micro_batches(samples, self.micro_batch_tokens)
        denominator = sum(len(b.target_N) for b in batches)
        sums: dict[str, float] = defaultdict(float)
        maxima: dict[str, float] = defaultdict(float)
        device = next(self.model.parameters()).device
        self.model.train()
        for batch in batches:
            batch = batch.to(device)
            logprobs_N, entropy_N = token_logprobs(self.model, batch, temperature)
            loss_N, logged = loss(logprobs_N, batch)
            (loss_N.sum() / denominator).backward()
            sums["loss"] += float(loss_N.detach().sum())
            sums["entropy"] += float(entropy_N.sum())
            for name, values_N in logged.items():
                if name.endswith("max"):
                    maxima[name] = max(maxima[name], float(values_N.max()))
                else:
                    sums[name] += float(values_N.sum())
        metrics = {name: total / max(1, denominator) for name, total in sums.items()} | maxima
        metrics["tokens"] = float(denominator)
        return metrics | self._apply()

    def _apply(self) -> dict[str, float]:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        finite = bool(torch.isfinite(norm))
        share = lr_share(self.step_count, self.total_steps, self.config)
        for optimizer, lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * share
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return {"grad_norm": float(norm), "lr": self.config.lr * share, "skipped": float(not finite)}

    @torch.no_grad()
    def evaluate_loss(self, samples: list[Sample]) -> float:
        """Token mean of the negative log-likelihood, without learning."""
        self.model.eval()
        total = count = 0.0
        device = next(self.model.parameters()).device
        for batch in micro_batches(samples, self.micro_batch_tokens):
            logprobs_N, _ = token_logprobs(self.model, batch.to(device))
            total -= float(logprobs_N.sum())
            count += len(logprobs_N)
        return total / max(1.0, count)

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step_count"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
