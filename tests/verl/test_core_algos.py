"""Advantages and losses against a second source: verl 0.9.1's ``core_algos`` and ``rollout_corr_helper``.

verl keeps padded tensors ``[B, T]`` with a mask of the sampled tokens; ours are flat over the sampled tokens, or one
number a trajectory. Every case has padding at the end, holes (what a tool wrote inside the response) and, where a mask
may have one, a row without a sampled token; everything outside the mask is noise that must not matter.

verl guards its means by dividing by ``N + 1e-8``, not by N: on few tokens that is more than the tolerance of 1e-9. This
one difference is taken away, so that all else can be held to 1e-9: ``exact_masked_mean`` replaces ``masked_mean`` (for
whitening and what is logged), and ``Batch.share_N`` knows of the same epsilon in verl's means over a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from retool.algo import advantages, losses
from retool.algo.batch import Sample, loss_shares

# "verl" alone would find this very folder, as a namespace package, where verl is not installed.
pytest.importorskip("verl.trainer", reason="needs the cluster environment (constraints of verl)")

from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

EPSILON = 1e-8
"""What verl adds to a number of tokens."""
SHAPES = [(3, 12), (8, 40), (24, 17), (1, 30)]
SEEDS = range(4)
MAX_TOKENS = 23
AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
"""Our name of each way to weigh the tokens' losses: verl's."""

each_batch = pytest.mark.parametrize(
    ("shape", "seed"), [(shape, seed) for shape in SHAPES for seed in SEEDS], ids=lambda value: str(value)
)
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def close(ours: Tensor, verls: Tensor, atol: float = 1e-9) -> None:
    """``rtol`` is there for sums in another order, under an exponential."""
    torch.testing.assert_close(ours.double(), verls.double(), atol=atol, rtol=1e-12)


def masked_mean_without_epsilon(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    return torch_functional.masked_sum(values, mask, axis) / mask.sum(axis=axis).clamp(min=1)


@pytest.fixture
def exact_masked_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_functional, "masked_mean", masked_mean_without_epsilon)


@dataclass(frozen=True)
class Batch:
    """``B`` responses of at most ``T`` tokens, and a source of noise."""

    mask_BT: Tensor
    """1 on sampled tokens; 0 on what a tool wrote and on padding."""
    random: torch.Generator

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape or self.mask_BT.shape, generator=self.random, dtype=torch.float64)

    def flat(self, values_BT: Tensor) -> Tensor:
        """The sampled tokens' values, ``[N]``."""
        return values_BT[self.mask_BT.bool()]

    @property
    def row_N(self) -> Tensor:
        return self.mask_BT.nonzero()[:, 0]

    @property
    def tokens(self) -> int:
        return int(self.mask_BT.sum())

    @property
    def learning(self) -> int:
        """How many rows have a sampled token."""
        return int(self.mask_BT.any(dim=1).sum())

    def share_N(self, aggregation: str, sequences: int) -> Tensor:
        """Each sampled token's part in the step; in ``sequence_mean`` ``1 / (S · (n + 1e-8))`` as with verl.

        Args:
            sequences: what ``constant`` divides by; 0: all of them.
        """
        masks = [[0, *row] for row in self.mask_BT.int().tolist()]
        samples = [Sample(ids_T=[0] * len(mask), mask_T=mask) for mask in masks]
        shares_B = loss_shares(samples, aggregation, sequences=sequences, max_tokens=MAX_TOKENS)
        share_N = torch.tensor(shares_B, dtype=torch.float64)[self.row_N]
        count_N = self.mask_BT.sum(dim=1)[self.row_N]
        return share_N * count_N / (count_N + EPSILON) if aggregation == "sequence_mean" else share_N


def make_batch(shape: tuple[int, int], seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    rows, length = shape
    mask_BT = torch.zeros(shape, dtype=torch.float64)
    for row in range(rows):
        end = int(torch.randint(length // 2, length + 1, (), generator=random))
        # Alternately a piece of sampled tokens and one that a tool wrote; either may come first or last.
        at, sampled = 0, bool(torch.rand((), generator=random) < 0.8)
        while at < end:
            piece = int(torch.randint(1, max(2, length // 3), (), generator=random))
            mask_BT[row, at : min(at + piece, end)] = float(sampled)
            at, sampled = at + piece, not sampled
    mask_BT[0, 0] = mask_BT[0, 1] = 1.0
    if rows > 2 and seed % 2:
        mask_BT[1] = 0.0
    return Batch(mask_BT, random)


# ---------------------------------------------------------------------------------------------------------- advantages


@dataclass(frozen=True)
class Groups:
    """A batch whose trajectories are of groups of one to five, in no order; the first two groups: all-equal rewards."""

    batch: Batch
    reward_B: Tensor
    group_B: Tensor

    @property
    def alone_B(self) -> Tensor:
        return self.group_B.bincount()[self.group_B] == 1

    @property
    def uid_B(self) -> np.ndarray:
        """As verl's trainer has them."""
        return np.array([f"prompt-{group}" for group in self.group_B.tolist()], dtype=object)

    @property
    def reward_BT(self) -> Tensor:
        """The outcome's reward at the last token, which need not be a sampled one: verl sums the row."""
        return torch.cat([torch.zeros_like(self.batch.mask_BT[:, 1:]), self.reward_B[:, None]], dim=1)

    def ours(self, method: Callable[[Tensor], Tensor]) -> Tensor:
        """``method`` of each group's rewards, ``[B]``."""
        result_B = torch.full_like(self.reward_B, torch.nan)
        for group in self.group_B.unique():
            result_B[self.group_B == group] = method(self.reward_B[self.group_B == group])
        return result_B


def make_groups(shape: tuple[int, int], seed: int) -> Groups:
    batch = make_batch(shape, seed)
    rows = shape[0]
    sizes = torch.randint(1, 6, (rows,), generator=batch.random)
    sizes[0] = 3
    group_B = torch.arange(rows).repeat_interleave(sizes)[:rows][torch.randperm(rows, generator=batch.random)]
    binary = seed % 2 == 0
    reward_B = batch.noise(rows).sign() if binary else batch.noise(rows)
    reward_B[group_B == 0] = 0.7
    reward_B[group_B == 1] = -1.0
    return Groups(batch, reward_B, group_B)


each_groups = pytest.mark.parametrize(
    ("shape", "seed"), [((rows, 12), seed) for rows in (1, 3, 8, 31) for seed in SEEDS], ids=lambda value: str(value)
)


def compare_groups(groups: Groups, ours_B: Tensor, verls_BT: Tensor) -> None:
    """Groups of more than one are equal at every sampled token, and verl's is zero elsewhere (ours has no elsewhere).
    A group of one is zero with us; with verl it keeps its raw reward."""
    mask_BT = groups.batch.mask_BT
    paired_BT, alone_BT = (where_B[:, None] * mask_BT for where_B in (~groups.alone_B, groups.alone_B))
    close(ours_B[:, None] * paired_BT, verls_BT * paired_BT)
    close(torch.zeros_like(mask_BT), verls_BT * (1 - mask_BT))
    assert (ours_B[groups.alone_B] == 0).all()
    # For grpo verl divides the lone reward by 1 + 1e-6, in float32.
    close(groups.reward_B[:, None] * alone_BT, verls_BT * alone_BT, atol=1e-5)


@each_groups
def test_grpo(shape: tuple[int, int], seed: int) -> None:
    """Equal but for groups of one. In an all-equal group verl divides a difference of zero (rounding: < 1e-15) by
    ``0 + 1e-6``; ours is zero by definition."""
    groups = make_groups(shape, seed)
    verls_BT, _ = core_algos.compute_grpo_outcome_advantage(groups.reward_BT, groups.batch.mask_BT, groups.uid_B)
    compare_groups(groups, groups.ours(advantages.grpo), verls_BT)


@each_groups
def test_dr_grpo(shape: tuple[int, int], seed: int) -> None:
    groups = make_groups(shape, seed)
    verls_BT, _ = core_algos.compute_grpo_outcome_advantage(
        groups.reward_BT, groups.batch.mask_BT, groups.uid_B, norm_adv_by_std_in_grpo=False
    )
    compare_groups(groups, groups.ours(advantages.dr_grpo), verls_BT)


@each_groups
def test_rloo(shape: tuple[int, int], seed: int) -> None:
    groups = make_groups(shape, seed)
    verls_BT, _ = core_algos.compute_rloo_outcome_advantage(groups.reward_BT, groups.batch.mask_BT, groups.uid_B)
    compare_groups(groups, groups.ours(advantages.rloo), verls_BT)


@each_groups
def test_rloo_vectorized(shape: tuple[int, int], seed: int) -> None:
    """verl's other RLOO gives a group of one zero, as ours does: equal everywhere."""
    groups = make_groups(shape, seed)
    mask_BT = groups.batch.mask_BT
    verls_BT, _ = core_algos.compute_rloo_vectorized_outcome_advantage(groups.reward_BT, mask_BT, groups.uid_B)
    close(groups.ours(advantages.rloo)[:, None] * mask_BT, verls_BT)


@each_groups
@pytest.mark.usefixtures("exact_masked_mean")
def test_reinforce_pp(shape: tuple[int, int], seed: int) -> None:
    """Equal everywhere, groups of one (which keep their reward before the whitening) included."""
    groups = make_groups(shape, seed)
    batch = groups.batch
    verls_BT, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        groups.reward_BT, batch.mask_BT, groups.uid_B
    )
    ours_B = advantages.reinforce_pp(groups.reward_B, groups.group_B, batch.mask_BT.sum(dim=1))
    close(ours_B[:, None] * batch.mask_BT, verls_BT)


@each_batch
@pytest.mark.usefixtures("exact_masked_mean")
def test_whiten(shape: tuple[int, int], seed: int) -> None:
    batch = make_batch(shape, seed)
    values_BT = batch.noise() * 3 + 0.5
    verls_BT = torch_functional.masked_whiten(values_BT, batch.mask_BT)
    close(advantages.whiten(batch.flat(values_BT)), batch.flat(verls_BT))


@each_batch
def test_what_the_epsilon_of_verl_changes(shape: tuple[int, int], seed: int) -> None:
    """With verl's own ``masked_mean``: the mean moves by ``1e-8 / N`` of itself, and so does what is whitened."""
    batch = make_batch(shape, seed)
    values_BT = batch.noise() * 3 + 0.5
    values_N = batch.flat(values_BT)
    mean = float(values_N.mean())
    close(values_N.mean(), torch_functional.masked_mean(values_BT, batch.mask_BT), abs(mean) * EPSILON / batch.tokens)
    verls_BT = torch_functional.masked_whiten(values_BT, batch.mask_BT)
    whitened_N = advantages.whiten(values_N)
    scale = abs(mean) / float(values_N.std()) + float(whitened_N.abs().max())
    close(whitened_N, batch.flat(verls_BT), scale * EPSILON / batch.tokens)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (0.0, 0.5)])
@each_batch
@pytest.mark.usefixtures("exact_masked_mean")
def test_gae(shape: tuple[int, int], seed: int, gamma: float, lam: float) -> None:
    """A reward at every sampled token. verl whitens the advantages of the batch before it returns them, so ours are
    whitened too; its returns are not, and ``returns − values`` are its advantages before."""
    batch = make_batch(shape, seed)
    rewards_BT, values_BT = batch.noise(), batch.noise()
    whitened_BT, returns_BT = core_algos.compute_gae_advantage_return(
        rewards_BT, values_BT, batch.mask_BT, gamma=gamma, lam=lam
    )
    rows = [
        advantages.gae(rewards_T[mask_T], values_T[mask_T], gamma, lam)
        for rewards_T, values_T, mask_T in zip(rewards_BT, values_BT, batch.mask_BT.bool(), strict=True)
    ]
    advantages_N, returns_N = (torch.cat(part) for part in zip(*rows, strict=True))
    close(returns_N, batch.flat(returns_BT))
    close(advantages_N, batch.flat(returns_BT - values_BT))
    close(advantages.whiten(advantages_N), batch.flat(whitened_BT))


# ------------------------------------------------------------------------------------------------------ policy losses


@dataclass(frozen=True)
class Policy:
    """A loss and its clips; gspo and cispo have no dual clip."""

    name: str
    clip_low: float
    clip_high: float
    dual_clip: float = 10.0

    def ours(self, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, row_N: Tensor) -> losses.PolicyLoss:
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.name == "vanilla":
            return losses.ppo_clip(logprobs_N, old_N, advantages_N, dual_clip=self.dual_clip, **clips)
        if self.name == "gspo":
            return losses.gspo(logprobs_N, old_N, advantages_N, row_N, **clips)
        return losses.cispo(logprobs_N, old_N, advantages_N, **clips)

    def verls(
        self, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, mode: str, **info: int
    ) -> tuple[Tensor, dict[str, float]]:
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=self.clip_low,
            clip_ratio_high=self.clip_high,
            clip_ratio_c=self.dual_clip,
            global_batch_info={"loss_scale_factor": MAX_TOKENS, **info},
        )
        loss = core_algos.get_policy_loss_fn(self.name)
        return loss(old_BT, logprobs_BT, advantages_BT, mask_BT, loss_agg_mode=mode, config=config)


POLICIES = [
    Policy("vanilla", 0.2, 0.28),
    Policy("vanilla", 0.2, 0.2, dual_clip=3.0),
    Policy("gspo", 3e-4, 4e-4),
    Policy("gspo", 0.2, 0.28),
    Policy("cispo", 1.0, 4.0),
    Policy("cispo", 0.2, 0.28),
]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.clip_low}-{p.clip_high}")


def make_logprobs(batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """New and old log-probabilities, near or far by the seed, and advantages of tokens or of whole sequences.

    From seed 2 on every seventh token has moved by ±25, over the bound of ±20, and each third row by 15 at each token,
    over GSPO's bound of 10.
    """
    logprobs_BT = -batch.noise().abs() * 2
    change_BT = batch.noise() * (3e-4, 0.3, 1.0, 4.0)[seed]
    if seed >= 2:
        change_BT.view(-1)[::7] = 25 * batch.noise().view(-1)[::7].sign()
        change_BT[2::3] += 15
    advantages_BT = batch.noise()
    if seed % 2:
        advantages_BT = advantages_BT[:, :1].expand_as(advantages_BT)
    return logprobs_BT, logprobs_BT - change_BT, advantages_BT


@each_aggregation
@each_policy
@each_batch
@pytest.mark.usefixtures("exact_masked_mean")
def test_policy_loss(shape: tuple[int, int], seed: int, policy: Policy, aggregation: str) -> None:
    """The step's loss, its gradient with respect to every log-probability, and what is logged.

    ``constant`` divides by the number of sequences, which verl counts without those that have no sampled token (unless
    its trainer passes ``global_batch_size``): ours is told that number.
    """
    batch = make_batch(shape, seed)
    new_BT, old_BT, advantages_BT = make_logprobs(batch, seed)
    verls_BT, ours_N = new_BT.clone().requires_grad_(), batch.flat(new_BT).requires_grad_()

    verls_loss, logged = policy.verls(verls_BT, old_BT, advantages_BT, batch.mask_BT, AGGREGATIONS[aggregation])
    ours = policy.ours(ours_N, batch.flat(old_BT), batch.flat(advantages_BT), batch.row_N)
    parts_N = ours.loss_N * batch.share_N(aggregation, batch.learning)
    verls_loss.backward()
    parts_N.sum().backward()

    close(parts_N.sum(), verls_loss)
    close(ours_N.grad, batch.flat(verls_BT.grad))
    close(torch.zeros_like(new_BT), verls_BT.grad * (1 - batch.mask_BT))
    close(ours.clipped_N.double().mean(), torch.tensor(logged["actor/pg_clipfrac"], dtype=torch.float64))
    close(ours.dual_clipped_N.double().mean(), torch.tensor(logged["actor/pg_clipfrac_lower"], dtype=torch.float64))
    close(ours.kl_N.mean(), torch.tensor(logged["actor/ppo_kl"], dtype=torch.float64))


@each_aggregation
@each_policy
def test_micro_batches(policy: Policy, aggregation: str) -> None:
    """Two of verl's micro-batches, told the whole batch's tokens and sequences, sum to our step.

    verl's trainer passes the number of all sequences, those without a sampled token among them, as ours does for
    ``constant``. For seq-mean-token-mean ours counts only sequences that have one: verl is given that number here.
    """
    batch = make_batch((9, 30), seed=3)
    assert batch.learning < 9
    new_BT, old_BT, advantages_BT = make_logprobs(batch, 3)
    info = {"batch_num_tokens": batch.tokens, "global_batch_size": 9 if aggregation == "constant" else batch.learning}
    verls = torch.tensor(0.0, dtype=torch.float64)
    for cut in (slice(0, 4), slice(4, 9)):
        cut_BT = (values_BT[cut] for values_BT in (new_BT, old_BT, advantages_BT, batch.mask_BT))
        verls += policy.verls(*cut_BT, AGGREGATIONS[aggregation], **info)[0]
    ours = policy.ours(batch.flat(new_BT), batch.flat(old_BT), batch.flat(advantages_BT), batch.row_N)
    close((ours.loss_N * batch.share_N(aggregation, 0)).sum(), verls)


@each_policy
def test_the_batches_reach_every_branch(policy: Policy) -> None:
    clipped, dual_clipped, beyond = [], [], []
    for shape in SHAPES:
        for seed in SEEDS:
            batch = make_batch(shape, seed)
            new_N, old_N, advantages_N = map(batch.flat, make_logprobs(batch, seed))
            loss = policy.ours(new_N, old_N, advantages_N, batch.row_N)
            clipped += loss.clipped_N.tolist()
            dual_clipped += loss.dual_clipped_N.tolist()
            beyond += ((new_N - old_N).abs() > losses.MAX_LOG_RATIO).tolist()
    assert 0.05 < np.mean(clipped) < 0.95
    assert np.mean(dual_clipped) > 0.02 or policy.name != "vanilla"
    assert np.mean(beyond) > 0.02


# ------------------------------------------------------------------------------------------------------- other losses


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@each_batch
def test_kl_penalty(shape: tuple[int, int], seed: int, estimator: str) -> None:
    """Values and gradients, differences over the bounds among them."""
    batch = make_batch(shape, seed)
    new_N, ref_N, weight_N = map(batch.flat, make_logprobs(batch, seed))
    ours_N, verls_N = (new_N.clone().requires_grad_() for _ in range(2))
    ours_kl_N = losses.kl_penalty(ours_N, ref_N, estimator)
    verls_kl_N = core_algos.kl_penalty(verls_N, ref_N, estimator)
    close(ours_kl_N, verls_kl_N)
    (ours_kl_N * weight_N).sum().backward()
    (verls_kl_N * weight_N).sum().backward()
    close(ours_N.grad, verls_N.grad)


@pytest.mark.parametrize("clip", [0.05, 0.5, 100.0])
@each_aggregation
@each_batch
@pytest.mark.usefixtures("exact_masked_mean")
def test_value_loss(shape: tuple[int, int], seed: int, aggregation: str, clip: float) -> None:
    """The step's loss, its gradient with respect to every value, and the clipped fraction."""
    batch = make_batch(shape, seed)
    values_BT, returns_BT = batch.noise(), batch.noise()
    old_BT = values_BT + 0.3 * batch.noise()
    verls_BT, ours_N = values_BT.clone().requires_grad_(), batch.flat(values_BT).requires_grad_()
    verls_loss, verls_clipped = core_algos.compute_value_loss(
        verls_BT,
        returns_BT,
        old_BT,
        batch.mask_BT,
        cliprange_value=clip,
        loss_agg_mode=AGGREGATIONS[aggregation],
        loss_scale_factor=MAX_TOKENS,
    )
    loss_N, clipped_N = losses.value_loss(ours_N, batch.flat(old_BT), batch.flat(returns_BT), clip=clip)
    loss = (loss_N * batch.share_N(aggregation, batch.learning)).sum()
    verls_loss.backward()
    loss.backward()
    close(loss, verls_loss)
    close(ours_N.grad, batch.flat(verls_BT.grad))
    close(torch.zeros_like(values_BT), verls_BT.grad * (1 - batch.mask_BT))
    close(clipped_N.double().mean(), verls_clipped)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.9, 1.1), (1e-12, 1e12)])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@each_batch
def test_importance_weights(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    seed: int,
    level: str,
    mode: str,
    low: float,
    high: float,
) -> None:
    """verl tells the mode by its threshold: "2.0" truncates, "0.5_2.0" masks. The last bounds are wider than exp(±20):
    there the safety bound shows.

    What verl logs about the weights is left out: where all of them are masked it divides by zero.
    """
    monkeypatch.setattr(rollout_corr_helper, "compute_is_metrics", lambda **_: {})
    batch = make_batch(shape, seed)
    new_BT, rollout_BT, _ = make_logprobs(batch, seed)
    verls_BT, _ = rollout_corr_helper.compute_rollout_correction_weights(
        new_BT - rollout_BT,
        batch.mask_BT,
        rollout_is=level,
        rollout_is_threshold=f"{low}_{high}" if mode == "mask" else f"{high}",
    )
    ours_N = losses.importance_weights(
        batch.flat(new_BT).requires_grad_(),
        batch.flat(rollout_BT),
        batch.row_N,
        level=level,
        mode=mode,
        low=low,
        high=high,
    )
    assert not ours_N.requires_grad
    close(ours_N, batch.flat(verls_BT))


@pytest.mark.parametrize(("low", "high"), [(0, 4), (1, 3), (2, 2)])
def test_importance_weights_on_the_bounds_are_kept(low: int, high: int) -> None:
    log_ratio_N = torch.tensor([-0.75, -0.25, 0.0, 0.25, 0.75], dtype=torch.float64)
    bounds = log_ratio_N[low].exp().item(), log_ratio_N[high].exp().item()
    verls_1N, _ = rollout_corr_helper.compute_rollout_correction_weights(
        log_ratio_N[None], torch.ones(1, 5, dtype=torch.float64), rollout_is_threshold=f"{bounds[0]!r}_{bounds[1]!r}"
    )
    ours_N = losses.importance_weights(
        log_ratio_N,
        torch.zeros_like(log_ratio_N),
        torch.zeros(5, dtype=torch.long),
        level="token",
        mode="mask",
        low=bounds[0],
        high=bounds[1],
    )
    close(ours_N, verls_1N[0])
    assert (ours_N > 0).sum() == high - low + 1
