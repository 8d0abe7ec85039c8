"""Per-token losses and what to log about them, named after their papers.

Each returns one value a token. The caller multiplies it by the token's share of the step (``batch.loss_shares``) and
sums, so that a step's loss does not depend on how it was cut into micro-batches. Token tensors are flat: ``N`` sampled
tokens of ``R`` whole sequences, ``row_N`` telling which one each belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before exp, as in verl, so that one wild token cannot make an infinity."""
MAX_SEQUENCE_LOG_RATIO = 10.0
"""The same for GSPO's sequence ratio, as in verl."""


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


def gspo(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    row_N: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """Group sequence policy optimisation (arXiv 2507.18071, eq. 5 and 7, in the token form of eq. 13)::

        s = exp(mean over the sequence's tokens of logp − logp_old)
        s_n = sg[s] · p_n / sg[p_n]                     (equal to s, with each token's own gradient)
        loss = −min(s_n·A, clip(s_n, 1 − low, 1 + high)·A)

    With one advantage a sequence and ``sequence_mean`` this is the paper's objective. All of a sequence's tokens must
    be in the same call.
    """
    change_N = logprobs_N - old_logprobs_N
    own_N = logprobs_N - logprobs_N.detach()
    log_ratio_N = (_sequence_mean(change_N.detach(), row_N) + own_N).clamp(max=MAX_SEQUENCE_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = torch.maximum(plain_N, clipped_N)
    with torch.no_grad():
        return PolicyLoss(
            loss_N=loss_N,
            clipped_N=(clipped_N > plain_N).float(),
            dual_clipped_N=torch.zeros_like(plain_N),
            kl_N=-change_N.detach(),
        )


def cispo(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """Clipped importance sampling weights (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)::

        loss = −sg[clip(r, 1 − low, 1 + high)] · A · logp

    No token's gradient is lost to the clip, it only weighs less. The paper has no lower bound (low = 1).
    """
    log_ratio_N = (logprobs_N - old_logprobs_N).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    weight_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLoss(
        loss_N=-weight_N * advantages_N * logprobs_N,
        clipped_N=(weight_N != ratio_N).float(),
        dual_clipped_N=torch.zeros_like(ratio_N),
        kl_N=-log_ratio_N,
    )


def kl_penalty(logprobs_N: Tensor, ref_logprobs_N: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each sampled token, ``[N]`` (Schulman 2020,
    joschu.net/blog/kl-approx.html), with ``d = logp − logp_ref``::

        k1 = d        k2 = d² / 2        k3 = exp(−d) − 1 + d

    k1 and k3 have the right mean; as a loss only k2 has the right gradient. k3 is bounded by ±10, its exponent by
    ±20, as in verl.

    Raises:
        ValueError: an unknown estimator.
    """
    difference_N = logprobs_N - ref_logprobs_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    if estimator == "k3":
        exponent_N = (-difference_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (exponent_N.exp() - exponent_N - 1).clamp(-10, 10)
    raise ValueError(f"estimator = {estimator!r}: choose one of k1, k2, k3")


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss (Schulman et al., OpenAI baselines; verl's ``compute_value_loss``)::

        loss = ½ · max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

    Returns:
        The loss, and 1 where the clip was active; ``[N]`` each.
    """
    kept_N = torch.maximum(torch.minimum(values_N, old_values_N + clip), old_values_N - clip)
    plain_N, clipped_N = (values_N - returns_N).square(), (kept_N - returns_N).square()
    return torch.maximum(plain_N, clipped_N) / 2, (clipped_N > plain_N).float().detach()


def importance_weights(
    logprobs_N: Tensor, rollout_logprobs_N: Tensor, row_N: Tensor, *, level: str, mode: str, low: float, high: float
) -> Tensor:
    """Weights ``[N]`` for tokens that another policy (the sampler, or an older one) has sampled: truncated importance
    sampling (Ionides 2008; for rollouts Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    training"), or the mask of IcePop (2025)::

        w = exp(logp − logp_rollout)        token: of each token; sequence: of the sequence's sum
        truncate: min(w, high)              mask: w where low ≤ w ≤ high, else 0

    Without gradient. ``logprobs_N`` is the learner's at the beginning of the step.

    Raises:
        ValueError: an unknown level or mode.
    """
    change_N = (logprobs_N - rollout_logprobs_N).detach()
    if level == "sequence":
        change_N = _sequence_sum(change_N, row_N)[row_N]
    elif level != "token":
        raise ValueError(f"level = {level!r}: choose token or sequence")
    weights_N = change_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        return weights_N.clamp(max=high)
    if mode == "mask":
        return torch.where((weights_N >= low) & (weights_N <= high), weights_N, 0.0)
    raise ValueError(f"mode = {mode!r}: choose truncate or mask")


def nll(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood of supervised tokens, ``[N]``."""
    return -logprobs_N


def _sequence_sum(values_N: Tensor, row_N: Tensor) -> Tensor:
    rows = int(row_N.max()) + 1 if len(row_N) else 0
    return values_N.new_zeros(rows).index_add(0, row_N, values_N)


def _sequence_mean(values_N: Tensor, row_N: Tensor) -> Tensor:
    """At each token, the mean over its sequence."""
    return (_sequence_sum(values_N, row_N) / _sequence_sum(torch.ones_like(values_N), row_N))[row_N]
