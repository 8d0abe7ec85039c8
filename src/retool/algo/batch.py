"""From sequences to micro-batches: rows with a common prefix side by side, little padding, one flat list of targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retool.errors import InvariantError

MIN_SAVED_TOKENS = 1024
"""A cluster of its own must save at least so many prefix tokens: a forward pass of its own costs about as much."""


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from."""

    ids_T: list[int]
    mask_T: list[int]
    """1 on the tokens that are learnt. The first token has no prediction and cannot be."""
    logprobs_T: list[float] | None = None
    """The sampling policy's; None for supervised learning."""
    advantage: float = 1.0


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
    old_logprobs_N: Tensor
    advantages_N: Tensor
    row_N: Tensor
    """Which row each target belongs to."""

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


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


def _clusters(samples: list[Sample]) -> list[list[Sample]]:
    """Samples whose common prefix is worth computing once, together; the rest together."""
    shared = common_prefix([s.ids_T for s in samples])
    branches: dict[int, list[Sample]] = defaultdict(list)
    for s in samples:
        branches[s.ids_T[shared] if len(s.ids_T) > shared else -1].append(s)
    if len(branches) == 1:
        return [samples]
    clusters: list[list[Sample]] = []
    rest: list[Sample] = []
    for branch in branches.values():
        gain = common_prefix([s.ids_T for s in branch]) - shared
        if gain * (len(branch) - 1) >= MIN_SAVED_TOKENS:
            clusters += _clusters(branch)
        else:
            rest += branch
    return [*clusters, rest] if rest else clusters


def micro_batches(samples: list[Sample], max_tokens: int) -> list[MicroBatch]:
    """Cut samples into micro-batches of at most ``max_tokens`` computed tokens (prefix + rows with padding); a longer
    single row is a micro-batch by itself. Samples without a token to learn are left out.

    Raises:
        InvariantError: ids, mask or log-probabilities are not aligned, or a first token is marked as learnt.
    """
    for s in samples:
        if len(s.ids_T) != len(s.mask_T) or (s.logprobs_T is not None and len(s.logprobs_T) != len(s.ids_T)):
            raise InvariantError("ids, mask and logprobs of a sample must have one length")
        if s.mask_T and s.mask_T[0]:
            raise InvariantError("a sample's first token has no prediction and cannot be learnt")
    samples = [s for s in samples if any(s.mask_T)]
    batches = []
    for cluster in _clusters(samples) if samples else []:
        # The prefix's own positions are not kept for prediction, so it ends before the first learnt token's source.
        prefix = min(common_prefix([s.ids_T for s in cluster]), min(s.mask_T.index(1) for s in cluster) - 1)
        pile: list[Sample] = []
        for s in sorted(cluster, key=lambda s: len(s.ids_T), reverse=True):
            longest = len(pile[0].ids_T if pile else s.ids_T) - 1 - prefix
            if pile and prefix + longest * (len(pile) + 1) > max_tokens:
                batches.append(_make(pile, prefix))
                pile = []
            pile.append(s)
        batches.append(_make(pile, prefix))
    return batches


def _make(rows: list[Sample], prefix: int) -> MicroBatch:
    length = max(len(s.ids_T) for s in rows) - 1 - prefix
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    source, target, old, advantages, row = [], [], [], [], []
    for b, s in enumerate(rows):
        ids_BT[b, : len(s.ids_T) - 1 - prefix] = torch.tensor(s.ids_T[prefix:-1])
        learnt = [t for t, m in enumerate(s.mask_T) if m]
        source += [b * length + t - 1 - prefix for t in learnt]
        target += [s.ids_T[t] for t in learnt]
        old += [s.logprobs_T[t] for t in learnt] if s.logprobs_T is not None else [0.0] * len(learnt)
        advantages += [s.advantage] * len(learnt)
        row += [b] * len(learnt)
    return MicroBatch(
        prefix_P=torch.tensor(rows[0].ids_T[:prefix], dtype=torch.long),
        ids_BT=ids_BT,
        source_N=torch.tensor(source, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        old_logprobs_N=torch.tensor(old, dtype=torch.float32),
        advantages_N=torch.tensor(advantages, dtype=torch.float32),
        row_N=torch.tensor(row, dtype=torch.long),
    )
