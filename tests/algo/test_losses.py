"""The losses against formulas written out token by token in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retool.algo.losses import nll, ppo_clip

LOW, HIGH, DUAL = 0.2, 0.28, 10.0


def by_hand(logprob: float, old: float, advantage: float) -> tuple[float, bool, bool]:
    """loss, clipped, dual-clipped of one token, from the papers' min and max."""
    ratio = math.exp(max(-20.0, min(20.0, logprob - old)))
    surrogate = min(ratio * advantage, max(1 - LOW, min(1 + HIGH, ratio)) * advantage)
    clipped = surrogate < ratio * advantage
    if advantage < 0 and surrogate < DUAL * advantage:
        return -DUAL * advantage, clipped, True
    return -surrogate, clipped, False


logprobs = st.floats(-12, 0)


@given(st.lists(st.tuples(logprobs, logprobs, st.floats(-3, 3)), min_size=1, max_size=20))
def test_ppo_clip_equals_the_formula_by_hand(tokens: list[tuple[float, float, float]]) -> None:
    new, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    loss = ppo_clip(new, old, advantages, clip_low=LOW, clip_high=HIGH, dual_clip=DUAL)
    expected = [by_hand(*token) for token in tokens]
    torch.testing.assert_close(loss.loss_N, torch.tensor([e[0] for e in expected], dtype=torch.float64))
    for i, (_, clipped, dual) in enumerate(expected):
        assert bool(loss.clipped_N[i]) == clipped
        assert bool(loss.dual_clipped_N[i]) == dual


def test_a_worked_case() -> None:
    """Four tokens, old probability 0.5 each.

    A = +1, new 0.60: ratio 1.2 is inside (0.8, 1.28): loss −1.2.
    A = +1, new 0.80: ratio 1.6 is clipped to 1.28: loss −1.28, no gradient.
    A = −1, new 0.30: ratio 0.6 is clipped to 0.8: loss 0.8, no gradient.
    A = −1, new 0.99, old 0.01: ratio 99 is over the dual clip of 10: loss 10, no gradient.
    """
    new = torch.tensor([0.6, 0.8, 0.3, 0.99], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([0.5, 0.5, 0.5, 0.01], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss = ppo_clip(new, old, advantages)
    assert loss.loss_N.tolist() == pytest.approx([-1.2, -1.28, 0.8, 10.0])
    loss.loss_N.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.2, 0.0, 0.0, 0.0])
    assert loss.clipped_N.tolist() == [0, 1, 1, 0]
    assert loss.dual_clipped_N.tolist() == [0, 0, 0, 1]


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    new = torch.randn(50, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(50, dtype=torch.float64)
    ppo_clip(new, new.detach(), advantages).loss_N.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_a_wild_ratio_stays_finite() -> None:
    new = torch.tensor([0.0, -500.0], requires_grad=True)
    loss = ppo_clip(new, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, 1.0]))
    loss.loss_N.sum().backward()
    assert torch.isfinite(loss.loss_N).all()
    assert torch.isfinite(new.grad).all()  # type: ignore[arg-type]


def test_nll_is_cross_entropy() -> None:
    logits = torch.randn(7, 11)
    target = torch.randint(0, 11, (7,))
    ours = nll(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
