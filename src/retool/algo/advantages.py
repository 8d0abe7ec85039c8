"""From rewards to advantages. Group methods give one number a trajectory, GAE one a sampled token."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to a group's standard deviation, as verl and TRL do."""
NO_SPREAD = 1e-10
"""A variance of returns that is only rounding."""
WHITEN_EPSILON = 1e-8
"""Added to a batch's variance, as verl does."""


def grpo(rewards_G: Tensor) -> Tensor:
    """Group-normalised advantages, DeepSeekMath (arXiv 2402.03300), section 4.1.2: ``A_i = (r_i − mean r) / std r``.

    The standard deviation is the sample's (divided by G − 1), as in verl and TRL. A group whose rewards are all equal
    teaches nothing and gets zeros: drop and count it (``is_zero_variance``).

    Args:
        rewards_G: one reward a trajectory, float, G ≥ 1.

    Returns:
        ``[G]``, float.
    """
    if is_zero_variance(rewards_G):
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + EPSILON)


def dr_grpo(rewards_G: Tensor) -> Tensor:
    """GRPO without the standard deviation, Dr. GRPO (arXiv 2503.20783), section 3.2: ``A_i = r_i − mean r``."""
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: Tensor) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740, section 3.2): ``A_i = r_i − mean of the other rewards``, which is
    ``G / (G − 1) · (r_i − mean r)``. A group of one has nobody to compare with and gets zero."""
    size = len(rewards_G)
    return dr_grpo(rewards_G) * (size / (size - 1)) if size > 1 else torch.zeros_like(rewards_G)


def reinforce_pp(rewards_B: Tensor, group_B: Tensor, tokens_B: Tensor) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): ``r_i − mean of its group``, then whitened over all sampled
    tokens of the batch, so that no group is scaled by its own standard deviation.

    A group of one has no baseline: its reward stays as it is, as in verl.

    Args:
        rewards_B: one reward a trajectory of the whole batch.
        group_B: its group's number.
        tokens_B: its sampled tokens, by which it weighs in the batch's mean and variance.

    Returns:
        ``[B]``, the advantage of each of the trajectory's tokens.
    """
    centred_B = torch.empty_like(rewards_B)
    for group in group_B.unique():
        members = group_B == group
        alone = int(members.sum()) == 1
        centred_B[members] = rewards_B[members] if alone else dr_grpo(rewards_B[members])
    return whiten(centred_B, tokens_B)


def whiten(values_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Shift and scale to mean 0 and variance 1 (the sample's, divided by N − 1).

    Args:
        weights_N: how many times each value counts; None: once. Fewer than two values in all are only centred.
    """
    weights_N = torch.ones_like(values_N) if weights_N is None else weights_N.to(values_N.dtype)
    count = weights_N.sum()
    if count == 0:
        return values_N
    centred_N = values_N - (values_N * weights_N).sum() / count
    variance = (centred_N.square() * weights_N).sum() / (count - 1).clamp(min=1)
    return centred_N * torch.rsqrt(variance + WHITEN_EPSILON)


def gae(rewards_N: Tensor, values_N: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) along the sampled tokens of one trajectory::

        δ_n = r_n + γ·V_{n+1} − V_n        A_n = δ_n + γ·λ·A_{n+1}        V after the last token is 0

    Only sampled tokens are passed: the next state after a call is the one at the first token after its observation, so
    the chain jumps over what the environment wrote.

    Args:
        rewards_N: each token's reward; an outcome's stands at the last one.
        values_N: the critic's estimate before each token was sampled.

    Returns:
        Advantages, and returns ``A + V`` for the critic to learn; ``[N]`` each.
    """
    next_N = torch.cat([values_N[1:], values_N.new_zeros(1)])
    deltas = (rewards_N + gamma * next_N - values_N).tolist()
    advantages, running = [], 0.0
    for delta in reversed(deltas):
        running = delta + gamma * lam * running
        advantages.append(running)
    advantages_N = torch.tensor(advantages[::-1], dtype=values_N.dtype)
    return advantages_N, advantages_N + values_N


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """``1 − Var(returns − values) / Var(returns)``: 1 for a perfect critic, 0 for one that knows only the mean; NaN
    where all returns are equal."""
    spread = returns_N.var(correction=0)
    return float(1 - (returns_N - values_N).var(correction=0) / spread) if spread > NO_SPREAD else float("nan")


def is_zero_variance(rewards_G: Tensor) -> bool:
    """Whether all the rewards are equal: a group of one, or all right, or all wrong."""
    return bool((rewards_G == rewards_G[0]).all())
