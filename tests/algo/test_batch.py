"""Micro-batches: what is predicted from where, and that nothing is lost by the cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.algo.batch import MIN_SAVED_TOKENS, Sample, common_prefix, micro_batches
from retool.errors import InvariantError


def targets(samples: list[Sample], max_tokens: int) -> list[tuple[int, ...]]:
    """Every target as (the whole context that its source sees, the target, its old log-probability, its advantage)."""
    found = []
    for batch in micro_batches(samples, max_tokens):
        rows, length = batch.ids_BT.shape
        assert int(batch.source_N.max()) < rows * length
        for source, target, old, advantage, row in zip(
            batch.source_N.tolist(),
            batch.target_N.tolist(),
            batch.old_logprobs_N.tolist(),
            batch.advantages_N.tolist(),
            batch.row_N.tolist(),
            strict=True,
        ):
            b, t = divmod(source, length)
            assert b == row
            context = batch.prefix_P.tolist() + batch.ids_BT[b, : t + 1].tolist()
            found.append((*context, -1, target, old, advantage))
    return sorted(found)


def expected(samples: list[Sample]) -> list[tuple[int, ...]]:
    found = []
    for s in samples:
        for t, learnt in enumerate(s.mask_T):
            if learnt:
                old = s.logprobs_T[t] if s.logprobs_T is not None else 0.0
                found.append((*s.ids_T[:t], -1, s.ids_T[t], old, s.advantage))
    return sorted(found)


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    prefixes = draw(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=3))
    samples = []
    for _ in range(draw(st.integers(1, 8))):
        ids = [9, *draw(st.sampled_from(prefixes)), *draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
        mask = [0, *draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        logprobs = [-float(i + 1) / 8 for i in range(len(ids))]
        samples.append(Sample(ids, mask, logprobs, advantage=draw(st.sampled_from([-0.5, 1.5]))))
    return samples


@given(sample_lists(), st.integers(1, 60))
def test_each_learnt_token_is_predicted_once_from_all_that_stands_before_it(
    samples: list[Sample], max_tokens: int
) -> None:
    """Catches a mask shifted by one, a lost or doubled row, and a prefix of the wrong length."""
    assert targets(samples, max_tokens) == expected(samples)


@given(sample_lists(), st.integers(1, 60))
def test_the_budget_holds_but_for_single_rows(samples: list[Sample], max_tokens: int) -> None:
    for batch in micro_batches(samples, max_tokens):
        rows, length = batch.ids_BT.shape
        assert rows == 1 or len(batch.prefix_P) + rows * length <= max_tokens


def test_prompts_that_share_much_are_computed_together() -> None:
    def rows(system: int, count: int) -> list[Sample]:
        ids = [system] * 300
        return [Sample([*ids, 50 + i, 60 + i], [0] * 301 + [1]) for i in range(count)]

    count = MIN_SAVED_TOKENS // 300 + 2
    batches = micro_batches(rows(1, count) + rows(2, count), 10_000)
    assert [len(b.prefix_P) for b in batches] == [300, 300]
    assert {int(b.prefix_P[0]) for b in batches} == {1, 2}


def test_samples_without_a_learnt_token_are_left_out() -> None:
    assert micro_batches([Sample([1, 2], [0, 0])], 10) == []
    assert micro_batches([], 10) == []


@pytest.mark.parametrize(
    "sample",
    [Sample([1, 2], [1, 0]), Sample([1, 2], [0]), Sample([1, 2], [0, 1], [0.0])],
    ids=["first token learnt", "mask too short", "logprobs too short"],
)
def test_broken_samples_are_refused(sample: Sample) -> None:
    with pytest.raises(InvariantError):
        micro_batches([sample], 10)


@pytest.mark.parametrize(
    ("sequences", "length"),
    [([], 0), ([[1, 2]], 2), ([[1, 2], [1, 3]], 1), ([[1], [1, 3]], 1), ([[2], [1]], 0), ([[1, 2], [1, 9], [1, 5]], 1)],
)
def test_common_prefix(sequences: list[list[int]], length: int) -> None:
    assert common_prefix(sequences) == length
