import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.algo.advantages import (
    EPSILON,
    dr_grpo,
    explained_variance,
    gae,
    grpo,
    is_zero_variance,
    reinforce_pp,
    rloo,
    whiten,
)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=2, max_size=16))
def test_grpo_equals_the_statistics_module(rewards: list[float]) -> None:
    ours = grpo(torch.tensor(rewards, dtype=torch.float64)).tolist()
    if len(set(rewards)) == 1:
        assert ours == [0.0] * len(rewards)
        return
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert ours == pytest.approx([(r - mean) / (std + EPSILON) for r in rewards])
    assert sum(ours) == pytest.approx(0, abs=1e-9)


def test_a_worked_case() -> None:
    """Rewards 1, −1, −1, −1: mean −0.5, sample standard deviation 1: advantages 1.5, −0.5, −0.5, −0.5."""
    assert grpo(torch.tensor([1.0, -1.0, -1.0, -1.0])).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


@pytest.mark.parametrize(
    ("rewards", "zero"), [([1.0], True), ([1.0, 1.0], True), ([-1.0, 1.0], False), ([0.6, 0.6, 0.5], False)]
)
def test_zero_variance(rewards: list[float], zero: bool) -> None:
    assert is_zero_variance(torch.tensor(rewards)) == zero


# --- cases worked by hand ---------------------------------------------------------------------------------------------


def test_group_methods_worked_by_hand() -> None:
    """Rewards 1, 1, −1, −1 have mean 0 and sample standard deviation √(4/3) = 1.1547.

    GRPO: ±1 / 1.1547 = ±0.8660. Dr. GRPO: ±1. RLOO: 1 − (1 − 1 − 1)/3 = 4/3 for a right one, −4/3 for a wrong one.
    """
    rewards = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    assert grpo(rewards).tolist() == pytest.approx([0.8660, 0.8660, -0.8660, -0.8660], abs=1e-4)
    assert dr_grpo(rewards).tolist() == pytest.approx([1, 1, -1, -1])
    assert rloo(rewards).tolist() == pytest.approx([4 / 3, 4 / 3, -4 / 3, -4 / 3])
    assert rloo(torch.tensor([0.7])).tolist() == [0.0]


def test_reinforce_pp_worked_by_hand() -> None:
    """Two groups: rewards 1, −1 (mean 0) and 3, 1 (mean 2), so ±1 each. With 1, 3, 1, 3 tokens the mean over tokens is
    (1 − 3 + 1 − 3)/8 = −0.5 and the sample variance (2·1.5² + 6·0.5²)/7 = 6/7."""
    found = reinforce_pp(
        torch.tensor([1.0, -1.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 1, 3])
    )
    std = math.sqrt(6 / 7)
    assert found.tolist() == pytest.approx([1.5 / std, -0.5 / std, 1.5 / std, -0.5 / std], rel=1e-6)


def test_gae_worked_by_hand() -> None:
    """Three sampled tokens, reward 1 at the last, values 0.5, 0.2, 0.4; γ = 0.9, λ = 0.5.

    δ₃ = 1 − 0.4 = 0.6; δ₂ = 0.9·0.4 − 0.2 = 0.16; δ₁ = 0.9·0.2 − 0.5 = −0.32.
    A₃ = 0.6; A₂ = 0.16 + 0.45·0.6 = 0.43; A₁ = −0.32 + 0.45·0.43 = −0.1265. Returns: A + V.
    """
    values = torch.tensor([0.5, 0.2, 0.4], dtype=torch.float64)
    advantages, returns = gae(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), values, 0.9, 0.5)
    assert advantages.tolist() == pytest.approx([-0.1265, 0.43, 0.6])
    assert returns.tolist() == pytest.approx([0.3735, 0.63, 1.0])
    monte_carlo, _ = gae(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), values, 1.0, 1.0)
    assert monte_carlo.tolist() == pytest.approx([0.5, 0.8, 0.6])


def test_whitening_has_mean_0_and_variance_1_by_weight() -> None:
    values, weights = torch.randn(9, dtype=torch.float64), torch.tensor([1, 2, 3] * 3)
    repeated = whiten(values, weights).repeat_interleave(weights)
    assert float(repeated.mean()) == pytest.approx(0, abs=1e-9)
    assert float(repeated.var()) == pytest.approx(1, rel=1e-6)
    assert whiten(torch.tensor([5.0])).tolist() == [0.0]
    assert len(whiten(torch.zeros(0))) == 0


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 7.0, dtype=torch.float64), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(4, dtype=torch.float64) * 3))
