"""Statistics against brute force and known values; every emitted name against its definition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic import ERROR, OK, attempts, code_turn, make_group, make_task, make_trajectory, malformed_turn

from retool.errors import InfraError
from retool.metrics import (
    METRICS,
    bootstrap_interval,
    definition,
    evaluation_summary,
    majority_vote,
    metrics_markdown,
    pass_at_k,
    rollout_metrics,
    validation_metrics,
)
from retool.types import ExecutionResult, ExecutionStatus, StopReason, TrajectoryGroup


@pytest.mark.parametrize("n,correct,k", [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, correct: int, k: int) -> None:
    subsets = list(itertools.combinations(range(n), k))
    share = sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, correct, k) == pytest.approx(share)


def test_pass_at_k_forms_no_large_binomial() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("n,correct,k", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_the_impossible(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    "predictions,right",
    [
        (["72", "71", "72"], True),
        (["71", "72", "71"], False),
        (["71", "72"], False),
        (["72", "71"], True),
        ([" 72", "71", "72 "], False),  # " 72" was graded wrong first: the class takes the first vote's grade
        ([None, None, "72"], True),
        ([None, None], False),
    ],
)
def test_majority_vote(predictions: list[str | None], right: bool) -> None:
    group = make_group(make_task(answer="72"), predictions)
    assert majority_vote(group.trajectories) is right
    assert majority_vote(group.trajectories[::-1]) is right


def test_interval_resamples_problems_not_samples() -> None:
    """20 problems whose 50 samples agree tell as much as 20 samples, not as 1,000."""
    tasks = [make_task(i) for i in range(20)]
    many = [make_group(t, ["72" if i % 2 else "0"] * 50) for i, t in enumerate(tasks)]
    one = [make_group(t, ["72" if i % 2 else "0"]) for i, t in enumerate(tasks)]
    wide = evaluation_summary(many, k=50, bootstrap=2000, seed=1)["ci95"]
    assert wide == evaluation_summary(one, k=1, bootstrap=2000, seed=1)["ci95"]
    assert wide[1] - wide[0] > 0.35  # 2 × 1.96 × sqrt(0.25 / 20) = 0.44


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval((rng.random(100) < 0.6).astype(float), 400, seed=trial)
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_is_decided_by_its_seed_and_needs_values() -> None:
    values = [0.0, 1.0, 0.25, 0.5, 1.0]
    assert bootstrap_interval(values, 100, 3) == bootstrap_interval(values, 100, 3)
    assert bootstrap_interval(values, 100, 3) != bootstrap_interval(values, 100, 4)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], 100, 0)


def _mixed() -> list[TrajectoryGroup]:
    """Two problems, by hand: the numbers below are counted from here."""
    a, b = make_task(1, "6", "mul"), make_task(2, "9", "gcd")
    ok = ExecutionResult(OK, "6", "", 0, 0.5)
    failed = ExecutionResult(ERROR, "", "NameError", 1, 1.5, truncated=True)
    first = make_trajectory(a, 0, "6", [code_turn("Code:", "x = 6\n\nprint(x)", ok)])
    second = make_trajectory(a, 1, "5", [code_turn("Code:", "y", failed), code_turn("Again:", "print(5)", ok)])
    third = make_trajectory(b, 0, "9")
    fourth = make_trajectory(b, 1, None, [malformed_turn("Code:", "{")], StopReason.MAX_TOKENS)
    return [
        TrajectoryGroup(a, [first, second]),
        TrajectoryGroup(b, [third, fourth], make_group(b, [], infra=1).infra_failed),
    ]


def test_evaluation_summary_counts_what_it_says() -> None:
    summary = evaluation_summary(_mixed(), k=2, bootstrap=200, seed=0)
    assert summary["accuracy"] == 0.5
    assert summary["samples"] == 4 and summary["problems"] == 2 and summary["infra"] == 1 and summary["k"] == 2
    assert summary["pass@2"] == 1.0 and summary["maj@2"] == 1.0
    assert summary["call_rate"] == 0.5, "a malformed call executes nothing"
    assert summary["accuracy_with_call"] == 0.5 and summary["accuracy_without_call"] == 0.5
    assert summary["num_turns"] == (4 + 6 + 2 + 4) / 4
    assert summary["executions"] == {s.value: {"ok": 2, "error": 1}.get(s.value, 0) for s in ExecutionStatus}
    assert summary["malformed"] == 1
    assert summary["stop_reasons"]["answered"] == 3 and summary["stop_reasons"]["max_tokens"] == 1
    assert list(summary["families"]) == ["gcd", "mul"]
    assert summary["families"]["mul"]["accuracy"] == 0.5 and summary["families"]["mul"]["call_rate"] == 1.0


def test_a_problem_weighs_the_same_however_many_samples_it_lost() -> None:
    whole, torn = make_group(make_task(1), ["72", "72"]), make_group(make_task(2), ["0"], infra=1)
    summary = evaluation_summary([whole, torn], k=2, bootstrap=100, seed=0)
    assert summary["accuracy"] == 0.5, "not 2/3: the lost sample must not shift the weight between problems"
    assert summary["pass@2"] == 1.0, "over the problem that kept both samples"


def test_a_problem_lost_whole_is_no_wrong_answer() -> None:
    summary = evaluation_summary([make_group(make_task(1), ["72"]), make_group(make_task(2), [], infra=1)], 1, 100, 0)
    assert summary["accuracy"] == 1.0 and summary["problems"] == 1 and summary["infra"] == 1


def test_an_evaluation_of_nothing_is_an_error() -> None:
    with pytest.raises(InfraError, match="lost"):
        evaluation_summary([make_group(make_task(), [], infra=2)], 1, 100, 0)
    with pytest.raises(ValueError, match="groups"):
        evaluation_summary([], 1, 100, 0)


def test_rollout_metrics_count_what_they_say() -> None:
    groups = _mixed()
    metrics = rollout_metrics(groups)
    trajectories = [t for g in groups for t in g.trajectories]
    assert metrics["acc/mean"] == 0.5 and metrics["critic/score/mean"] == 0.0
    assert metrics["acc/ci95_low"] <= 0.5 <= metrics["acc/ci95_high"]
    assert metrics["tool/call_rate"] == 0.5 and metrics["tool/calls_per_trajectory"] == 0.75
    assert metrics["tool/status/ok"] == pytest.approx(2 / 3) and metrics["tool/status/error/count"] == 1
    assert metrics["tool/malformed"] == 1 and metrics["tool/malformed_share"] == 0.25
    assert metrics["tool/truncated_share"] == pytest.approx(1 / 3)
    assert metrics["tool/duration_s/mean"] == pytest.approx(2.5 / 3)
    assert metrics["code/lines_mean"] == pytest.approx(4 / 3), "blank lines do not count"
    assert metrics["response_length/clip_ratio"] == 0.25 and metrics["stop/max_tokens"] == 0.25
    assert metrics["response_length/max"] == max(t.response_length for t in trajectories)
    assert metrics["tokens/sampled"] == sum(sum(t.mask_T) for t in trajectories)
    assert metrics["tokens/sampled"] + metrics["tokens/observed"] == sum(t.response_length for t in trajectories)
    assert metrics["infra/trajectories"] == 1
    assert metrics["group/zero_variance_share"] == 0.0


def test_zero_variance_share_sees_groups_without_a_signal() -> None:
    groups = [make_group(make_task(i), p) for i, p in enumerate((["72", "72"], ["0", "1"], ["72", "0"], ["72"]))]
    assert rollout_metrics(groups)["group/zero_variance_share"] == 0.75


def test_a_number_without_anything_to_count_is_left_out() -> None:
    metrics = rollout_metrics([make_group(make_task(), ["72", "0"])])
    assert metrics["tool/call_rate"] == 0.0 and "code/lines_mean" not in metrics and "acc/with_call" not in metrics
    lost = rollout_metrics([make_group(make_task(), [], infra=3)])
    assert lost == {"infra/trajectories": 3.0, "rollout/trajectories": 0.0}


def test_validation_metrics_name_each_source() -> None:
    metrics = validation_metrics(_mixed(), k=2, bootstrap=100, seed=0)
    assert metrics["val-core/world/acc/mean@2"] == 0.5
    assert metrics["val-aux/world/acc/pass@2"] == 1.0
    assert metrics["val-aux/tool/call_rate"] == 0.5


def test_every_emitted_name_is_defined_and_finite() -> None:
    groups = [*_mixed(), *attempts(1, 12, 4, 0.6, 0.7)]
    emitted = rollout_metrics(groups) | validation_metrics(groups, k=2, bootstrap=100, seed=0)
    assert [name for name in emitted if definition(name) is None] == []
    assert all(isinstance(v, float) and math.isfinite(v) for v in emitted.values())
    assert [name for name in evaluation_summary(groups, 2, 100, 0) if definition(name) is None] == []
    assert definition("val-core/openai/gsm8k/acc/mean@30") and definition("acc/median") is None
    assert definition("response_length/clip_ratio") != definition("response_length/mean")


def test_the_page_of_definitions_is_up_to_date() -> None:
    page = metrics_markdown()
    written = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert written.read_text(encoding="utf-8") == page, "python -m retool.metrics > docs/metrics.md"
    assert page.count("\n| `") == len(METRICS)
