import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retool.algo.advantages import EPSILON, grpo, is_zero_variance


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
