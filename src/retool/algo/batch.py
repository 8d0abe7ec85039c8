"""From sequences to micro-batches: rows with a common prefix side by side, little padding, one flat list of targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retool.errors import InvariantError

MIN_SAVED_TOKENS = 1024
"""A cluster of its own must save at least so many prefix tokens: a forward pass of its own costs about as much."""


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from. What ends in ``_N`` has one value for each learnt token, in their order."""

    ids_T: list[int]
    mask_T: list[int]
    """1 on the tokens that are learnt. The first token has no prediction and cannot be."""
    logprobs_T: list[float] | None = None
    """The old policy's; None for supervised learning."""
    advantage: float = 1.0
    """Each learnt token's, where ``advantages_N`` is None."""
    advantages_N: Sequence[float] | None = None
    weights_N: Sequence[float] | None = None
    """Importance weights; None: 1."""
    ref_logprobs_N: Sequence[float] | None = None
    values_N: Sequence[float] | None = None
    """The critic's, when the step began."""
    returns_N: Sequence[float] | None = None

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(self.mask_T)


@dataclass(frozen=True)
class MicroBatch:
    """``B`` right-padded rows after a common prefix of ``P`` tokens, and the ``N`` tokens to learn, flat.

    ``source_N[n]`` is the place in the flattened ``[B·T]`` rows whose hidden state predicts ``target_N[n]``: the
    place before the target's own, so a row's last token is not even computed.
    """

    prefix_P: Tensor
    ids_BT: Tensor
    source_N: Tensor
    target_N: Tensor
    row_N: Tensor
    """Which row each target belongs to."""
    samples: list[int]
    """Which sample each row is."""
    share_N: Tensor
    """What each token's loss counts in the step's (``loss_shares``)."""
    old_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    ref_logprobs_N: Tensor
    values_N: Tensor
    returns_N: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def loss_shares(samples: Sequence[Sample], aggregation: str, *, sequences: int = 0, max_tokens: int = 0) -> list[float]:
    """For each sample, what the loss of one of its learnt tokens counts in the loss of the step; of ``S`` samples with
    ``n`` learnt tokens each, ``M`` in all::

        token_mean      1 / M                  DAPO (arXiv 2503.14476, eq. 12)
        sequence_mean   1 / (S · n)            GRPO (arXiv 2402.03300, eq. 3), GSPO (arXiv 2507.18071, eq. 5)
        constant        1 / (S · max_tokens)   Dr. GRPO (arXiv 2503.20783, section 3.2)

    Args:
        sequences: constant: S, where some sequences of the batch have nothing to learn and are not among the samples.

    Raises:
        ValueError: an unknown aggregation, or constant without ``max_tokens``.
    """
    counts = [s.learnt for s in samples]
    if aggregation == "token_mean":
        return [1 / max(1, sum(counts))] * len(counts)
    if aggregation == "sequence_mean":
        learning = sum(1 for count in counts if count)
        return [1 / (learning * count) if count else 0.0 for count in counts]
    if aggregation == "constant" and max_tokens > 0:
        return [1 / ((sequences or len(counts)) * max_tokens)] * len(counts)
    raise ValueError(f"aggregation = {aggregation!r}, max_tokens = {max_tokens}: unknown, or constant without a length")


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix: that of the smallest and the largest in lexicographic order."""
    if not sequences:
        return 0
    low, high = min(sequences), max(sequences)
    length = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        length += 1
    return length


@dataclass(frozen=True)
class _Row:
    """A sample on its way into a micro-batch."""

    index: int
    sample: Sample
    share: float

    @property
    def ids_T(self) -> list[int]:
        return self.sample.ids_T


def _clusters(rows: list[_Row]) -> list[list[_Row]]:
    """Rows whose common prefix is worth computing once, together; the rest together."""
    shared = common_prefix([r.ids_T for r in rows])
    branches: dict[int, list[_Row]] = defaultdict(list)
    for r in rows:
        branches[r.ids_T[shared] if len(r.ids_T) > shared else -1].append(r)
    if len(branches) == 1:
        return [rows]
    clusters: list[list[_Row]] = []
    rest: list[_Row] = []
    for branch in branches.values():
        gain = common_prefix([r.ids_T for r in branch]) - shared
        if gain * (len(branch) - 1) >= MIN_SAVED_TOKENS:
            clusters += _clusters(branch)
        else:
            rest += branch
    return [*clusters, rest] if rest else clusters


def micro_batches(
    samples: Sequence[Sample], max_tokens: int, shares: Sequence[float] | None = None
) -> list[MicroBatch]:
    """Cut samples into micro-batches of at most ``max_tokens`` computed tokens (prefix + rows with padding); a longer
    single row is a micro-batch by itself. Samples without a token to learn are left out.

    Args:
        shares: of each sample (``loss_shares``); None: 0, where nothing is to be learnt.

    Raises:
        InvariantError: what a sample holds is not aligned, or a first token is marked as learnt.
    """
    for s in samples:
        _check(s)
    shares = shares if shares is not None else [0.0] * len(samples)
    rows = [_Row(i, s, share) for i, (s, share) in enumerate(zip(samples, shares, strict=True)) if any(s.mask_T)]
    batches = []
    for cluster in _clusters(rows) if rows else []:
        # The prefix's own positions are not kept for prediction, so it ends before the first learnt token's source.
        prefix = min(common_prefix([r.ids_T for r in cluster]), min(r.sample.mask_T.index(1) for r in cluster) - 1)
        pile: list[_Row] = []
        for r in sorted(cluster, key=lambda r: len(r.ids_T), reverse=True):
            longest = len(pile[0].ids_T if pile else r.ids_T) - 1 - prefix
            if pile and prefix + longest * (len(pile) + 1) > max_tokens:
                batches.append(_make(pile, prefix))
                pile = []
            pile.append(r)
        batches.append(_make(pile, prefix))
    return batches


def _check(s: Sample) -> None:
    if len(s.ids_T) != len(s.mask_T) or (s.logprobs_T is not None and len(s.logprobs_T) != len(s.ids_T)):
        raise InvariantError("ids, mask and logprobs of a sample must have one length")
    if s.mask_T and s.mask_T[0]:
        raise InvariantError("a sample's first token has no prediction and cannot be learnt")
    for values_N in (s.advantages_N, s.weights_N, s.ref_logprobs_N, s.values_N, s.returns_N):
        if values_N is not None and len(values_N) != s.learnt:
            raise InvariantError(f"a sample has {len(values_N)} values for {s.learnt} learnt tokens")


def _make(rows: list[_Row], prefix: int) -> MicroBatch:
    if len(rows) == 1:
        prefix = 0  # nothing is shared, and attention needs no mask
    length = max(len(r.ids_T) for r in rows) - 1 - prefix
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    source, target, row = [], [], []
    values: dict[str, list[float]] = {name: [] for name in _VALUES}
    for b, r in enumerate(rows):
        s = r.sample
        ids_BT[b, : len(s.ids_T) - 1 - prefix] = torch.tensor(s.ids_T[prefix:-1])
        learnt = [t for t, m in enumerate(s.mask_T) if m]
        source += [b * length + t - 1 - prefix for t in learnt]
        target += [s.ids_T[t] for t in learnt]
        row += [b] * len(learnt)
        none = [0.0] * len(learnt)
        values["share_N"] += [r.share] * len(learnt)
        values["old_logprobs_N"] += [s.logprobs_T[t] for t in learnt] if s.logprobs_T is not None else none
        values["advantages_N"] += s.advantages_N or [s.advantage] * len(learnt)
        values["weights_N"] += s.weights_N or [1.0] * len(learnt)
        for name in ("ref_logprobs_N", "values_N", "returns_N"):
            values[name] += getattr(s, name) or none
    return MicroBatch(
        prefix_P=torch.tensor(rows[0].ids_T[:prefix], dtype=torch.long),
        ids_BT=ids_BT,
        source_N=torch.tensor(source, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        row_N=torch.tensor(row, dtype=torch.long),
        samples=[r.index for r in rows],
        **{name: torch.tensor(values[name], dtype=torch.float32) for name in _VALUES},
    )


_VALUES = ("share_N", "old_logprobs_N", "advantages_N", "weights_N", "ref_logprobs_N", "values_N", "returns_N")
"""The float columns of a micro-batch."""
