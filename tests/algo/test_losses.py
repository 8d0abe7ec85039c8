"""The losses against formulas written out token by token in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.algo.losses import cispo, gspo, importance_weights, kl_penalty, nll, ppo_clip, value_loss

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


@settings(deadline=None)
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


# --- the other losses: cases worked by hand --------------------------------------------------------------------------


def test_gspo_worked_by_hand() -> None:
    """Two sequences, old log-probabilities 0.

    Row 0 has log-ratios 0.2 and 0.4: their mean is 0.3, s = e^0.3 = 1.3499, A = +1, clip (0.8, 1.5): inside, so each
    token's loss is −1.3499 and its gradient −1.3499 (the token's own, through p / sg[p]).
    Row 1 has the log-ratio 0.5: s = e^0.5 = 1.6487 is clipped to 1.5 for A = +2: loss −3, no gradient.
    """
    new = torch.tensor([0.2, 0.4, 0.5], dtype=torch.float64).requires_grad_()
    old, rows = torch.zeros(3, dtype=torch.float64), torch.tensor([0, 0, 1])
    loss = gspo(new, old, torch.tensor([1.0, 1.0, 2.0]), rows, clip_low=0.2, clip_high=0.5)
    s = math.exp(0.3)
    assert loss.loss_N.tolist() == pytest.approx([-s, -s, -3.0])
    assert loss.clipped_N.tolist() == [0, 0, 1]
    loss.loss_N.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-s, -s, 0.0])


def test_cispo_worked_by_hand() -> None:
    """Old probability 0.5, A = +1 and −2. New 0.9: ratio 1.8 weighs as 1.3, loss −1.3 · ln 0.9, gradient −1.3: clipped,
    and still learnt from. New 0.1: ratio 0.2 weighs as itself (no lower bound): loss 0.4 · ln 0.1, gradient 0.4."""
    new = torch.tensor([0.9, 0.1], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    loss = cispo(new, old, torch.tensor([1.0, -2.0], dtype=torch.float64), clip_low=1.0, clip_high=0.3)
    assert loss.loss_N.tolist() == pytest.approx([-1.3 * math.log(0.9), 0.4 * math.log(0.1)])
    assert loss.clipped_N.tolist() == [1, 0]
    loss.loss_N.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.3, 0.4])


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo"])
def test_every_loss_begins_as_reinforce(name: str) -> None:
    """Where the policy has not moved, the gradient of each is −A."""
    new = torch.randn(12, dtype=torch.float64).requires_grad_()
    advantages, rows = torch.randn(4, dtype=torch.float64).repeat_interleave(3), torch.arange(4).repeat_interleave(3)
    old = new.detach()
    losses = {
        "ppo_clip": lambda: ppo_clip(new, old, advantages),
        "gspo": lambda: gspo(new, old, advantages, rows),
        "cispo": lambda: cispo(new, old, advantages),
    }
    losses[name]().loss_N.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_kl_estimators_worked_by_hand() -> None:
    """p = 0.5, p_ref = 0.25: d = ln 2. k1 = 0.6931, k2 = 0.2402, k3 = ½ − 1 + ln 2 = 0.1931."""
    p, ref = torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log()
    found = [float(kl_penalty(p, ref, name)) for name in ("k1", "k2", "k3")]
    assert found == pytest.approx([math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5])
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(p, ref, "k4")


def test_kl_estimators_estimate_the_divergence() -> None:
    """k1 and k3 have KL(p ‖ q) as their mean over samples of p; k2's gradient is that of the divergence."""
    logits = torch.randn(6, dtype=torch.float64).requires_grad_()
    p, q = logits.log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    weights = p.exp().detach()
    divergence = (p.exp() * (p - q)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((weights * kl_penalty(p, q, name)).sum(), divergence)
    (ours,) = torch.autograd.grad((weights * kl_penalty(p, q, "k2")).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(ours, exact)


def test_value_loss_worked_by_hand() -> None:
    """R = 1, old value 0, clip 0.5. V = 0.4 is inside: ½ · 0.36. V = 0.8 is clipped to 0.5: ½ · max(0.04, 0.25), no
    gradient. V = −2 is clipped to −0.5, but the unclipped error is larger: ½ · 9, gradient −3."""
    values = torch.tensor([0.4, 0.8, -2.0], dtype=torch.float64).requires_grad_()
    loss_N, clipped_N = value_loss(values, torch.zeros(3).double(), torch.ones(3).double(), clip=0.5)
    assert loss_N.tolist() == pytest.approx([0.18, 0.125, 4.5])
    assert clipped_N.tolist() == [0, 1, 0]
    loss_N.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.6, 0.0, -3.0])


def test_importance_weights_worked_by_hand() -> None:
    """Log-ratios ln 3 and ln ½ of one sequence, ln ¼ of another. Its tokens weigh 3, ½, ¼; the sequences 1.5 and ¼."""
    change = torch.tensor([3.0, 0.5, 0.25], dtype=torch.float64).log()
    rollout, rows = torch.full((3,), -2.0, dtype=torch.float64), torch.tensor([0, 0, 1])

    def weights(level: str, mode: str) -> list[float]:
        found = importance_weights(rollout + change, rollout, rows, level=level, mode=mode, low=0.4, high=2.0)
        return [float(w) for w in found]

    assert weights("token", "truncate") == pytest.approx([2.0, 0.5, 0.25])
    assert weights("token", "mask") == pytest.approx([0.0, 0.5, 0.0])
    assert weights("sequence", "truncate") == pytest.approx([1.5, 1.5, 0.25])
    assert weights("sequence", "mask") == pytest.approx([1.5, 1.5, 0.0])
    for level, mode in (("turn", "mask"), ("token", "cut")):
        with pytest.raises(ValueError, match="choose"):
            weights(level, mode)
