"""Per-token losses and what to log about them. Each returns one value a token: the caller sums and divides by the one
global count of tokens, so that a step's loss does not depend on how it was cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before exp, as in verl, so that one wild token cannot make an infinity."""


@dataclass(frozen=True)
class PolicyLoss:
    """``[N]`` each, over sampled tokens; all but ``loss_N`` are without gradient."""

    loss_N: Tensor
    clipped_N: Tensor
    """1 where the upper or lower clip was active (pg_clipfrac)."""
    dual_clipped_N: Tensor
    """1 where the dual clip was active (pg_clipfrac_lower)."""
    kl_N: Tensor
    """old − new log-probability, the k1 estimate of KL(old ‖ new) (ppo_kl)."""


def ppo_clip(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with DAPO's clip-higher (arXiv 2503.14476, eq. 10) and dual
    clip (arXiv 1912.09729, eq. 5)::

        r = exp(logp − logp_old)
        loss = −min(r·A, clip(r, 1 − low, 1 + high)·A), for A < 0 at most −c·A

    Args:
        logprobs_N: of the sampled tokens under the policy being trained; carries the gradient.
        old_logprobs_N: under the policy that sampled them.
        advantages_N: each token's advantage.
    """
    log_ratio_N = (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    upper_N = torch.maximum(plain_N, clipped_N)
    bound_N = -advantages_N * dual_clip
    loss_N = torch.where(advantages_N < 0, torch.minimum(upper_N, bound_N), upper_N)
    with torch.no_grad():
        return PolicyLoss(
            loss_N=loss_N,
            clipped_N=(clipped_N > plain_N).float(),
            dual_clipped_N=((advantages_N < 0) & (upper_N > bound_N)).float(),
            kl_N=-log_ratio_N.detach(),
        )


def nll(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood of supervised tokens, ``[N]``."""
    return -logprobs_N
