"""What is counted, in evaluation and in reinforcement learning alike, and the definition of every number shown.

Trajectories that the infrastructure lost (``TrajectoryGroup.infra_failed``) are counted and otherwise left out: they
say nothing about the model. ``METRICS`` holds one definition for each name; ``docs/metrics.md`` is made from it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from retool.errors import InfraError
from retool.types import ExecutionResult, ExecutionStatus, StopReason, Trajectory, TrajectoryGroup

CONFIDENCE = 0.95
STEP_BOOTSTRAP = 1000
"""Resamples for the interval of one training step: the ends of a 95 % interval then move by well under a point."""
CHUNK_CELLS = 4_000_000
"""Resampled problems held at once (32 MB of int64), so that a large benchmark needs no more memory than a small one."""
CUT_SHORT = (StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL)
"""The endings by which a trajectory ran out of room."""

FloatArray = npt.NDArray[np.float64]


# --- statistics over problems ---------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of ``k`` samples, drawn without replacement from ``n``, is right.

    ``1 − C(n − c, k) / C(n, k)``: the unbiased estimator of Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", equation 1, as a product so that no large binomial is formed.

    Raises:
        ValueError: not ``0 <= correct <= n`` or not ``1 <= k <= n``.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, correct={correct}, k={k}): needs 0 <= correct <= n and 1 <= k <= n")
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def majority_vote(trajectories: Sequence[Trajectory]) -> bool:
    """Whether the most frequent answer is right.

    Answers are the graded predictions, equal where their strings are equal without surrounding blanks; a trajectory
    without a prediction does not vote. Among equally frequent answers the one wins whose first vote has the lowest
    ``sample``. Nobody votes: wrong.
    """
    votes: Counter[str] = Counter()
    right: dict[str, bool] = {}
    for trajectory in sorted(trajectories, key=lambda t: t.sample):
        grade = trajectory.grade
        if grade is not None and grade.prediction is not None:
            answer = grade.prediction.strip()
            votes[answer] += 1
            right.setdefault(answer, grade.correct)
    # most_common keeps the order of first votes among equals
    return right[votes.most_common(1)[0][0]] if votes else False


def bootstrap_interval(values: Sequence[float] | FloatArray, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of ``values`` (one a problem): percentile bootstrap, Efron 1979.

    Problems are resampled, not samples: the samples of one problem are alike, and to treat them as independent would
    make the interval too narrow. Where all values are equal the interval has no width, which understates what is
    not known.

    Raises:
        ValueError: no values, or fewer than one resample.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or resamples < 1:
        raise ValueError(f"bootstrap_interval: {array.size} values, {resamples} resamples; needs at least one of each")
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK_CELLS // array.size)
    means = [
        array[rng.integers(0, array.size, size=(min(rows, resamples - done), array.size))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(low), float(high)


# --- one trajectory -------------------------------------------------------------------------------------------------


def _correct(trajectory: Trajectory) -> bool:
    return trajectory.grade is not None and trajectory.grade.correct


def _executions(trajectory: Trajectory) -> list[ExecutionResult]:
    return [e for turn in trajectory.turns for e in turn.executions if e is not None]


def _called(trajectory: Trajectory) -> bool:
    return bool(_executions(trajectory))


def _malformed(trajectory: Trajectory) -> int:
    return sum(1 for turn in trajectory.turns for call in turn.calls if call.code is None)


def _code_lines(trajectory: Trajectory) -> list[int]:
    """Lines that are not blank, of each executed program."""
    return [
        sum(1 for line in (call.code or "").splitlines() if line.strip())
        for turn in trajectory.turns
        for call, execution in zip(turn.calls, turn.executions, strict=False)
        if execution is not None
    ]


def _mean(values: Iterable[float]) -> float | None:
    array = np.fromiter(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def _problem_means(groups: Sequence[TrajectoryGroup]) -> list[float]:
    """The share of right trajectories of each problem that kept any."""
    return [sum(map(_correct, g.trajectories)) / len(g.trajectories) for g in groups if g.trajectories]


def _kept(groups: Sequence[TrajectoryGroup]) -> list[Trajectory]:
    return [t for g in groups for t in g.trajectories]


# --- evaluation -----------------------------------------------------------------------------------------------------


def _accuracy(groups: Sequence[TrajectoryGroup], bootstrap: int, seed: int) -> dict[str, Any]:
    means = _problem_means(groups)
    trajectories = _kept(groups)
    return {
        "accuracy": _mean(means),
        "ci95": list(bootstrap_interval(means, bootstrap, seed)),
        "samples": len(trajectories),
        "problems": len(means),
        "call_rate": _mean(map(_called, trajectories)),
    }


def _families(groups: Sequence[TrajectoryGroup], bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
    by_family: dict[str, list[TrajectoryGroup]] = {}
    for group in groups:
        if group.trajectories and "family" in group.task.meta:
            by_family.setdefault(str(group.task.meta["family"]), []).append(group)
    return {name: _accuracy(by_family[name], bootstrap, seed) for name in sorted(by_family)}


def _at_k(groups: Sequence[TrajectoryGroup], k: int) -> dict[str, float | None]:
    """pass@k and maj@k over the problems that kept at least ``k`` trajectories."""
    firsts = [sorted(g.trajectories, key=lambda t: t.sample) for g in groups if len(g.trajectories) >= k]
    return {
        f"pass@{k}": _mean(pass_at_k(len(ts), sum(map(_correct, ts)), k) for ts in firsts),
        f"maj@{k}": _mean(float(majority_vote(ts[:k])) for ts in firsts),
    }


def evaluation_summary(groups: list[TrajectoryGroup], k: int, bootstrap: int, seed: int) -> dict[str, Any]:
    """One evaluation as numbers for ``summary.json``; the keys are defined in ``METRICS``, section "evaluation".

    ``k`` is the number of samples a problem was given; ``bootstrap`` the number of resamples of the intervals, drawn
    with ``seed``. Values are numbers, lists of numbers, dicts of such, or None where nothing was there to count.

    Raises:
        ValueError: no groups, or ``k`` below 1.
        InfraError: the infrastructure lost every trajectory.
    """
    if not groups or k < 1:
        raise ValueError(f"evaluation_summary: {len(groups)} groups, k={k}; needs at least one of each")
    trajectories = _kept(groups)
    if not trajectories:
        raise InfraError("every trajectory of the evaluation was lost to the infrastructure: nothing to measure")
    statuses = Counter(e.status for t in trajectories for e in _executions(t))
    stops = Counter(t.stop_reason for t in trajectories)
    return {
        **_accuracy(groups, bootstrap, seed),
        "k": k,
        **_at_k(groups, k),
        "accuracy_with_call": _mean(_correct(t) for t in trajectories if _called(t)),
        "accuracy_without_call": _mean(_correct(t) for t in trajectories if not _called(t)),
        "num_turns": _mean(t.num_turns for t in trajectories),
        "response_length": _mean(t.response_length for t in trajectories),
        "executions": {status.value: statuses[status] for status in ExecutionStatus},
        "malformed": sum(map(_malformed, trajectories)),
        "stop_reasons": {reason.value: stops[reason] for reason in StopReason},
        "infra": sum(len(g.infra_failed) for g in groups),
        "families": _families(groups, bootstrap, seed),
    }


def validation_metrics(groups: list[TrajectoryGroup], k: int, bootstrap: int, seed: int) -> dict[str, float]:
    """One in-loop evaluation as flat metrics under verl's names, for the same line as the step's other metrics.

    Raises as ``evaluation_summary`` does.
    """
    metrics: dict[str, float | None] = {}
    by_source: dict[str, list[TrajectoryGroup]] = {}
    for group in groups:
        by_source.setdefault(group.task.source, []).append(group)
    for source, members in sorted(by_source.items()):
        if not _kept(members):
            continue
        core = _accuracy(members, bootstrap, seed)
        metrics[f"val-core/{source}/acc/mean@{k}"] = core["accuracy"]
        metrics[f"val-core/{source}/acc/ci95_low"], metrics[f"val-core/{source}/acc/ci95_high"] = core["ci95"]
        metrics |= {f"val-aux/{source}/acc/{name}": value for name, value in _at_k(members, k).items()}
    whole = evaluation_summary(groups, k, bootstrap, seed)
    metrics["val-aux/num_turns/mean"] = whole["num_turns"]
    metrics["val-aux/response_length/mean"] = whole["response_length"]
    metrics["val-aux/tool/call_rate"] = whole["call_rate"]
    metrics["val-aux/infra/trajectories"] = whole["infra"]
    return {name: float(value) for name, value in metrics.items() if value is not None}


# --- one step of reinforcement learning -----------------------------------------------------------------------------


def _spread(prefix: str, values: Iterable[float]) -> dict[str, float]:
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return {}
    return {
        f"{prefix}/mean": float(array.mean()),
        f"{prefix}/max": float(array.max()),
        f"{prefix}/min": float(array.min()),
    }


def _tool_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    executions = [e for t in trajectories for e in _executions(t)]
    calls = sum(t.num_calls for t in trajectories)
    malformed = sum(map(_malformed, trajectories))
    metrics: dict[str, float | None] = {
        "tool/call_rate": _mean(map(_called, trajectories)),
        "tool/executions": len(executions),
        "tool/calls_per_trajectory": len(executions) / len(trajectories),
        "tool/malformed": malformed,
        "tool/malformed_share": malformed / calls if calls else None,
        "tool/truncated_share": _mean(e.truncated for e in executions),
        "tool/duration_s/mean": _mean(e.duration_s for e in executions),
        "tool/wait_s/mean": _mean(t.sandbox_s for t in trajectories),
        "code/lines_mean": _mean(n for t in trajectories for n in _code_lines(t)),
    }
    statuses = Counter(e.status for e in executions)
    for status in ExecutionStatus:
        metrics[f"tool/status/{status.value}/count"] = statuses[status]
        metrics[f"tool/status/{status.value}"] = statuses[status] / len(executions) if executions else None
    return metrics


def rollout_metrics(groups: list[TrajectoryGroup]) -> dict[str, float]:
    """The metrics of one step's graded rollouts; each is defined in ``METRICS``. A number that nothing was there to
    count for (the mean length of no code) is left out, not zero. The interval's resamples have a fixed seed."""
    metrics: dict[str, float | None] = {"infra/trajectories": sum(len(g.infra_failed) for g in groups)}
    trajectories = _kept(groups)
    metrics["rollout/trajectories"] = len(trajectories)
    if not trajectories:
        return {name: float(value) for name, value in metrics.items() if value is not None}
    means = _problem_means(groups)
    metrics["acc/mean"] = _mean(means)
    metrics["acc/ci95_low"], metrics["acc/ci95_high"] = bootstrap_interval(means, STEP_BOOTSTRAP, seed=0)
    metrics["acc/with_call"] = _mean(_correct(t) for t in trajectories if _called(t))
    metrics["acc/without_call"] = _mean(_correct(t) for t in trajectories if not _called(t))
    metrics |= _spread("critic/score", (t.reward for t in trajectories))
    metrics |= _spread("response_length", (t.response_length for t in trajectories))
    metrics["response_length/clip_ratio"] = _mean(t.stop_reason in CUT_SHORT for t in trajectories)
    metrics |= _spread("prompt_length", (len(t.prompt_ids) for t in trajectories))
    metrics |= _spread("num_turns", (t.num_turns for t in trajectories))
    metrics["tokens/sampled"] = sum(t.sampled_length for t in trajectories)
    metrics["tokens/observed"] = sum(t.response_length - t.sampled_length for t in trajectories)
    metrics |= _tool_metrics(trajectories)
    kept = [g.trajectories for g in groups if g.trajectories]
    metrics["group/zero_variance_share"] = _mean(len({t.reward for t in ts}) == 1 for ts in kept)
    metrics["group/size_mean"] = _mean(len(ts) for ts in kept)
    stops = Counter(t.stop_reason for t in trajectories)
    metrics |= {f"stop/{reason.value}": stops[reason] / len(trajectories) for reason in StopReason}
    return {name: float(value) for name, value in metrics.items() if value is not None}


def figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the terminal shows of a step; what there is no number for is left out."""
    shown = {
        "accuracy": "acc/mean",
        "calls": "tool/call_rate",
        "turns": "num_turns/mean",
        "entropy": "actor/entropy",
        "gap": "training/rollout_logprob_gap_max",
        "infra": "infra/trajectories",
    }
    found = {label: metrics.get(name, float("nan")) for label, name in shown.items()}
    return {label: value for label, value in found.items() if math.isfinite(value)}


# --- definitions ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, dict[str, str]] = {
    "Rollouts of a step": {
        "acc/mean": "Mean over problems of the share of right trajectories in the group.",
        "acc/ci95_low": "Lower end of the 95 % interval of acc/mean: percentile bootstrap over problems.",
        "acc/ci95_high": "Upper end of the 95 % interval of acc/mean: percentile bootstrap over problems.",
        "acc/with_call": "Share of right ones among the trajectories that executed code at least once.",
        "acc/without_call": "Share of right ones among the trajectories that executed no code.",
        "critic/score/<mean|max|min>": "Reward of a trajectory.",
        "response_length/<mean|max|min>": "Tokens after the prompt, sampled and observed.",
        "response_length/clip_ratio": "Share of trajectories that ran out of room (max_tokens or context_full).",
        "prompt_length/<mean|max|min>": "Tokens of the prompt, over trajectories.",
        "num_turns/<mean|max|min>": "User + assistant + tool-answer messages, as in verl: calls ≈ (num_turns − 2) / 2.",
        "rollout/trajectories": "Trajectories of the step, those lost to the infrastructure not counted.",
        "tokens/sampled": "Tokens that the policy sampled in the step.",
        "tokens/observed": "Tokens that the environment appended in the step.",
        "group/zero_variance_share": "Share of groups whose rewards are all equal: they teach nothing.",
        "group/size_mean": "Trajectories of a group that were kept.",
        "stop/<reason>": "Share of trajectories that ended for this reason (types.StopReason).",
        "infra/trajectories": "Trajectories lost to the infrastructure: in no other number, never learnt from.",
        "grading/hard": "Answers that were no plain number or word and not seen before: judged by math-verify.",
        "grading/timeouts": "Of those, answers that it could not judge in time: they count as wrong.",
        "grading/crashes": "Of those, answers that ended its process (out of memory): they count as wrong.",
        "grading/over_budget": "Of those, answers not asked about: the step's time for such was spent; wrong.",
    },
    "Dynamic sampling and the long tail": {
        "sampling/rounds": "Draws of rl.prompts tasks that the step needed.",
        "sampling/replaced": "Groups all right or all wrong, which others took the place of: rolled out for nothing.",
        "sampling/surplus": "Mixed groups that the batch had no room for.",
        "sampling/missing": "Groups that the batch lacks, since rl.dynamic_sampling.max_rounds was reached.",
        "tail/groups_left": "Groups that were begun and not waited for.",
        "tail/tokens_left": "Tokens sampled for them so far.",
        "tail/carried_tokens": "Tokens that the step did not have to sample, since earlier steps had.",
    },
    "Calls of the tool": {
        "tool/call_rate": "Share of trajectories that executed code at least once.",
        "tool/executions": "Runs of code.",
        "tool/calls_per_trajectory": "Runs of code by number of trajectories.",
        "tool/status/<status>": "Share of runs that ended with this status (types.ExecutionStatus).",
        "tool/status/<status>/count": "Runs that ended with this status.",
        "tool/malformed": "Calls that could not be run: no readable JSON, an unknown tool, no code.",
        "tool/malformed_share": "tool/malformed by number of calls, malformed ones included.",
        "tool/truncated_share": "Share of runs whose output was cut.",
        "tool/duration_s/mean": "Seconds that a run of code took.",
        "tool/wait_s/mean": "Seconds that a trajectory waited for its code.",
        "code/lines_mean": "Lines of an executed program, blank ones not counted.",
    },
    "Evaluation during training": {
        "val-core/<source>/acc/mean@<k>": "mean@k: mean over problems of the share of right answers among k samples.",
        "val-core/<source>/acc/<ci95_low|ci95_high>": "95 % interval of mean@k: percentile bootstrap over problems.",
        "val-aux/<source>/acc/pass@<k>": "Chance that one of k samples is right (Chen et al. 2021, unbiased).",
        "val-aux/<source>/acc/maj@<k>": "Share of problems whose most frequent answer among k samples is right.",
        "val-aux/num_turns/mean": "num_turns/mean of the evaluation.",
        "val-aux/response_length/mean": "response_length/mean of the evaluation.",
        "val-aux/tool/call_rate": "tool/call_rate of the evaluation.",
        "val-aux/infra/trajectories": "infra/trajectories of the evaluation.",
    },
    "Learner": {
        "actor/pg_loss": "Policy-gradient loss: token mean over the step of the clipped objective, negated.",
        "actor/entropy": "Mean entropy of the policy over sampled tokens, in nats.",
        "actor/ppo_kl": "Mean of old − new log-probability over sampled tokens: the k1 estimate of the KL divergence.",
        "actor/pg_clipfrac": "Share of sampled tokens for which the upper or the lower clip was active.",
        "actor/pg_clipfrac_lower": "Share of sampled tokens for which the dual clip was active.",
        "actor/grad_norm": "L2 norm of the gradient before clipping.",
        "actor/lr": "Learning rate of the step.",
        "<actor|train>/tokens": "Learnt tokens of the step.",
        "<actor|train>/skipped": "1 where the gradient was not finite and the step changed no weight, else 0.",
        "<actor|critic>/updates": "Optimiser steps that the step made; 0 where every group was dropped.",
        "actor/kl_loss": "Mean of the KL estimate (rl.kl.estimator) that is added to the loss.",
        "actor/reference_kl": "Mean estimate of KL(policy ‖ reference) over sampled tokens, when the step began.",
        "critic/advantages/<mean|max|min>": "Advantage of a sampled token.",
        "critic/vf_loss": "Value loss: token mean of half the clipped squared error.",
        "critic/vf_clipfrac": "Share of sampled tokens whose value had moved beyond rl.critic.value_clip.",
        "critic/vf_explained_var": "1 − Var(return − value) / Var(return) over sampled tokens, before the update.",
        "critic/vpred_mean": "Mean value of a sampled token during the update.",
        "critic/values/mean": "Mean value of a sampled token when the step began.",
        "critic/returns/mean": "Mean return (advantage + value) of a sampled token.",
        "critic/grad_norm": "L2 norm of the critic's gradient before clipping.",
        "critic/lr": "Learning rate of the critic.",
        "training/staleness_<mean|max>": "Weight updates since the oldest token of a trajectory was sampled.",
        "training/rollout_is_weight_<mean|max>": "Importance weight of a sampled token (rl.correction).",
        "training/rollout_is_bounded_share": "Share of sampled tokens whose weight was truncated, or masked to 0.",
        "training/rollout_logprob_gap_mean": "Mean |learner − sampler| log-probability over sampled tokens.",
        "training/rollout_logprob_gap_max": "Largest |learner − sampler| log-probability of a sampled token.",
        "train/loss": "Supervised loss: mean negative log-likelihood of the learnt tokens, in nats.",
        "train/lr": "Learning rate of the supervised step.",
        "train/grad_norm": "L2 norm of the supervised gradient before clipping.",
        "val/loss": "train/loss on held-out conversations.",
        "<actor|critic>/skipped": "Updates that changed nothing because their gradient was not finite.",
        "tokens/learnt": "Sampled tokens that the step learnt from: the loss's denominator.",
        "perf/rollout_tokens_per_s": "tokens/sampled by timing_s/rollout.",
        "perf/throughput": "Prompt and response tokens of the step by timing_s/step (as in verl, on one device).",
        "health/<alarm>": "1 in a step in which this alarm was raised (docs/health.md).",
        "timing_s/<part>": "Seconds of wall time that this part of the step took; timing_s/step is the whole.",
    },
    "Only on the cluster engine (verl's own)": {
        "infra/sandbox_restarts": "How often the nodes' sandboxes have been restarted since this start of the run.",
        "training/rollout_actor_probs_pearson_corr": "Correlation of the sampler's and the actor's probabilities of "
        "the sampled tokens, before any weight changed.",
        "training/rollout_probs_diff_<mean|max|std>": "Of |sampler's − actor's probability| of those tokens.",
        "training/rollout_probs_diff_valid": "1 where the two before could be computed.",
        "rollout_corr/<training|rollout>_<ppl|log_ppl>": "Perplexity of the trajectories, or its logarithm, under the "
        "actor or the sampler.",
        "rollout_corr/<kl|k3_kl>": "Sampler from actor: mean log-ratio, or the k3 estimator.",
        "rollout_corr/<log_ppl_diff|log_ppl_abs_diff|log_ppl_diff_max|log_ppl_diff_min|ppl_ratio>": "Of the two "
        "perplexities, trajectory by trajectory.",
        "rollout_corr/chi2_<token|seq>": "χ² of actor and sampler: mean squared ratio − 1, of tokens or sequences.",
        "rollout_corr/<part>": "What importance weights did (`rl.correction`), as verl counts it.",
        "actor/loss": "The whole loss: actor/pg_loss and what is added to it.",
        "<actor|critic>/perf/<part>": "Memory of a training worker in GB.",
        "critic/loss": "The critic's loss, as critic/vf_loss.",
        "critic/<rewards|returns|values|advantages>/<mean|max|min>": "Of the batch, tokens without padding; rewards "
        "with a KL penalty in them.",
        "response_length_non_aborted/<part>": "As response_length, without empty answers.",
        "response/aborted_ratio": "Share of empty answers.",
        "prompt_length/clip_ratio": "Share of prompts as long as the longest of the batch.",
        "global_seqlen/<part>": "Tokens of each data-parallel rank, before and after balancing.",
        "training/num_turns/<mean|max|min>": "As num_turns, of the trajectories that were learnt from.",
        "training/off_policy/<part>/<mean|max|min>": "Over how many versions of the weights a trajectory was sampled, "
        "and how old they were.",
        "training/off_policy/evicted_samples": "Groups thrown away because they were too old (asynchronous trainers).",
        "training/filter_groups/<part>": "Groups that dynamic sampling replaced, or threw away as surplus.",
        "training/rollout_failure/<part>": "Groups whose trajectories were all lost, and that were drawn again.",
        "training/<global_step|epoch>": "verl's count of steps, and of passes over the run's data file.",
        "train/<mfu|global_tokens>": "sft: share of the GPU's peak arithmetic; tokens of the step.",
        "train/total_tokens(B)": "sft: billions of tokens so far.",
        "perf/<cpu_memory_used_gb|max_memory_allocated_gb|max_memory_reserved_gb>": "sft: memory of the first rank.",
        "perf/mfu/<actor|critic>": "Share of the GPUs' peak arithmetic that training used.",
        "perf/<time_per_step|total_num_tokens>": "Seconds, and tokens, of the step.",
        "timing_per_token_ms/<part>": "timing_s of the part by the tokens that it worked on.",
        "val-aux/num_turns/<max|min>": "As val-aux/num_turns/mean.",
        "val-aux/<source>/acc_success_only/<name>": "verl's accuracy, lost trajectories left out, as in val-core's.",
        "val-aux/<source>/reward/<name>": "The reward of the validation's trajectories.",
        "val-<core|aux>/<source>/acc/<best|worst|maj|std>@<n>/<name>": "verl's bootstrap over a problem's samples.",
    },
    "Evaluation (summary.json)": {
        "accuracy": "mean@k: mean over problems of the share of right trajectories.",
        "ci95": "[low, high]: 95 % interval of accuracy, percentile bootstrap over problems.",
        "samples": "Graded trajectories.",
        "problems": "Problems with at least one graded trajectory.",
        "k": "Samples that each problem was given.",
        "pass@<k>": "As val-aux/<source>/acc/pass@<k>, over problems that lost no sample; null where there is none.",
        "maj@<k>": "As val-aux/<source>/acc/maj@<k>; among equals the answer with the lowest sample number wins.",
        "call_rate": "As tool/call_rate.",
        "accuracy_with_call": "As acc/with_call.",
        "accuracy_without_call": "As acc/without_call.",
        "num_turns": "As num_turns/mean.",
        "response_length": "As response_length/mean.",
        "executions": "{status: runs of code that ended so}.",
        "malformed": "As tool/malformed.",
        "stop_reasons": "{reason: trajectories that ended so}.",
        "infra": "As infra/trajectories.",
        "families": "{family: accuracy, ci95, samples, problems, call_rate} where tasks have meta.family.",
    },
}

METRICS: dict[str, str] = {name: text for section in SECTIONS.values() for name, text in section.items()}
"""Definition by name or pattern: ``<a|b>`` stands for one of its words, any other ``<…>`` for what varies."""


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    def expand(match: re.Match[str]) -> str:
        inside = match.group(1)
        if "|" in inside:
            return f"(?:{inside})"
        # a source may be a hub name with a slash in it
        return ".+" if inside == "source" else "[^/]+"

    def compiled(name: str) -> re.Pattern[str]:
        pieces = re.split(r"(<[^>]+>)", name)
        return re.compile("".join(re.sub("<(.+)>", expand, p) if p.startswith("<") else re.escape(p) for p in pieces))

    return [(compiled(name), text) for name, text in METRICS.items()]


def definition(name: str) -> str | None:
    """The definition of a metric's name; None where there is none."""
    return next((text for pattern, text in _patterns() if pattern.fullmatch(name)), None)


def metrics_markdown() -> str:
    """``docs/metrics.md``, from ``SECTIONS``."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run shows, with its definition. Names follow verl where verl has one. This page is made",
        "from `retool.metrics.SECTIONS` by `python -m retool.metrics > docs/metrics.md`; edit the definitions there.",
        "",
        "Trajectories that the infrastructure lost are counted and otherwise left out. A number that nothing was there",
        "to count for is left out of `metrics.jsonl`, and null in `summary.json`.",
    ]
    for section, entries in SECTIONS.items():
        lines += ["", f"## {section}", "", "| name | definition |", "| --- | --- |"]
        for name, text in entries.items():
            # a bar inside a cell would end it
            lines.append(f"| `{name.replace('|', chr(92) + '|')}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_markdown(), end="")
