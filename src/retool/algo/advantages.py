"""From the rewards of a group to one advantage a trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the standard deviation, as verl and TRL do."""


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


def is_zero_variance(rewards_G: Tensor) -> bool:
    """Whether all the rewards are equal: a group of one, or all right, or all wrong."""
    return bool((rewards_G == rewards_G[0]).all())
