"""Whether a run of reinforcement learning still goes well: each step's metrics against ``[health]`` of the recipe.

An alarm says in one line what was seen, what that usually means and what to try; docs/health.md says more. Nothing
here computes anything of a trajectory: it reads what ``metrics.jsonl`` holds, so that a run that is taken up again
judges as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from retool.config import ALARMS, HealthConfig

REPEAT_STEPS = 10
"""An alarm that stays on is given again after so many steps."""
ONCE_CALLED = 5.0
"""``no_calls`` needs a run whose call rate was once above so many times ``call_rate_low``: with fewer calls than that
there was nothing to lose."""

CALL_RATE = "tool/call_rate"
ZERO_VARIANCE = "group/zero_variance_share"
ACCURACY = "acc/mean"
LOST, KEPT = "infra/trajectories", "rollout/trajectories"
LOST_SHARE = "infra/share"
"""Made here of the two before; no metric of a run."""
GRADIENT_NORMS = ("actor/grad_norm", "critic/grad_norm")
MODELS = ("actor", "critic")


class Advice(NamedTuple):
    """Each ends a sentence: "usually …", "try …"."""

    means: str
    attempt: str


ADVICE: dict[str, Advice] = {
    "no_calls": Advice(
        "a direct answer pays as well as a call: calls fail, time out or are malformed, or text alone is enough",
        "rl.reward=verl, a lower rl.optim.lr, more SFT on calls, a longer sandbox.timeout_s, harder tasks",
    ),
    "malformed": Advice(
        "too little SFT on the format, updates that wear it away, or a model of another rollout.format",
        "more SFT on calls, a lower rl.optim.lr or rollout.temperature, rl.kl.place=loss",
    ),
    "entropy_collapse": Advice(
        "the samples of a task are all alike: nothing left to compare, nothing new is tried",
        "an earlier checkpoint with a larger rl.clip_high, rl.entropy_bonus=0.001 or a lower rl.optim.lr",
    ),
    "entropy_explosion": Advice(
        "updates push towards noise: too high an rl.optim.lr or rl.entropy_bonus, or a large logprob_gap",
        "an earlier checkpoint with a lower rl.optim.lr, rl.entropy_bonus=0 or rl.kl.place=loss",
    ),
    "logprob_gap": Advice(
        "rounding where it was there from step 1; where it grows, stale samples, or ever less likely tokens",
        "rl.correction.level=token, model.dtype=float32, rl.tail.partial=false",
    ),
    "zero_variance": Advice(
        "tasks too easy (accuracy near 1), too hard or misgraded (near 0)",
        "other tasks, rl.dynamic_sampling.enabled=true, a larger rl.group_size, rl.grading=lenient",
    ),
    "cut_short": Advice(
        "answers have outgrown their room, or the policy repeats itself until the end",
        "rl.overlong.buffer_share=0.2; for sound answers more rollout.max_response_tokens and max_context",
    ),
    "infra": Advice(
        "the machine, not the model: too little memory for the sandbox, or its service overloaded",
        "retool doctor, fewer sandbox.workers, less sandbox.concurrency, more sandbox.retries",
    ),
    "gradient_spike": Advice(
        "a few odd trajectories in this step; where it comes again, a policy that runs away",
        "reading the step's trajectories, then a lower rl.optim.lr or rl.optim.grad_clip",
    ),
    "not_finite": Advice(
        "at step 1 the model's weights or dtype, later an overflow of a policy that runs away",
        "model.dtype=float32, a lower rl.optim.lr, rl.optim.warmup_steps=10, an earlier checkpoint",
    ),
}
"""What an alarm usually means and what to try, by name; the table of docs/health.md holds the same words."""


@dataclass(frozen=True)
class Alarm:
    name: str
    """One of ``config.ALARMS``."""
    step: int
    saw: str
    """"call rate 0.01 over 5 steps, was 0.62"."""
    means: str
    attempt: str

    @property
    def line(self) -> str:
        return f"{self.name} at step {self.step}: {self.saw} — usually {self.means} — try {self.attempt}"


class Bound(NamedTuple):
    """A check of a mean over the window."""

    metric: str
    what: str
    setting: str
    """The limit's name in ``[health]``."""
    is_low: bool = False
    """The alarm rings below the limit, not above it."""


BOUNDS: dict[str, Bound] = {
    "malformed": Bound("tool/malformed_share", "malformed share of calls", "malformed_high"),
    "entropy_collapse": Bound("actor/entropy", "entropy in nats", "entropy_low", is_low=True),
    "entropy_explosion": Bound("actor/entropy", "entropy in nats", "entropy_high"),
    "logprob_gap": Bound("training/rollout_logprob_gap_mean", "gap of learner and sampler", "gap_high"),
    "zero_variance": Bound(ZERO_VARIANCE, "groups of equal rewards", "zero_variance_high"),
    "cut_short": Bound("response_length/clip_ratio", "share that ran out of room", "cut_high"),
    "infra": Bound(LOST_SHARE, "share of trajectories lost", "infra_high"),
}
WINDOWED = (CALL_RATE, *dict.fromkeys(bound.metric for bound in BOUNDS.values()))

Verdicts = dict[str, str | None]
"""By alarm: what was seen, or None where all is well. An alarm that is not here was not judged in the step."""


class Monitor:
    """Judges one step after the other.

    A metric that is missing or not finite is not judged and enters no window: a window holds the last
    ``config.window`` values that were there, fewer at the beginning of a run.

    Args:
        config: ``[health]`` of the recipe.
        compares_groups: ``RLConfig.compares_groups``. False: a group of equal rewards teaches as any other does (with a
            critic a group may be one trajectory), and ``zero_variance`` is not judged.
    """

    def __init__(self, config: HealthConfig, *, compares_groups: bool = True) -> None:
        self._config = config
        self._compares_groups = compares_groups
        self._windows = {name: deque[float](maxlen=config.window) for name in (*WINDOWED, *GRADIENT_NORMS)}
        self._best_call_rate = 0.0
        self._skipped_in_a_row = dict.fromkeys(MODELS, 0)
        self._rang: dict[str, int] = {}
        """The alarms that are on, and the step in which each was last given."""

    @property
    def skipped_in_a_row(self) -> int:
        """Steps in a row in which the actor had updates skipped and none applied, or the critic, whichever has more.
        A step in which a model was not to be updated at all neither counts nor ends the row."""
        return max(self._skipped_in_a_row.values())

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms to give in this step, in the order of ``ALARMS``. One that stays on is held back for
        ``REPEAT_STEPS`` steps, unless it ends the run.

        Args:
            metrics: as they are logged, so that ``replay`` sees the same.
        """
        values = {name: value for name, value in metrics.items() if math.isfinite(value)}
        verdicts = self._judge(values)
        alarms = []
        for name in ALARMS:
            saw = verdicts.get(name)
            if saw is not None and self._is_due(name, step):
                self._rang[name] = step
                alarms.append(Alarm(name, step, saw, *ADVICE[name]))
            elif saw is None and name in verdicts:
                self._rang.pop(name, None)
        return alarms

    def replay(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Take in the steps that the run has behind it, in order: rows of ``metrics.jsonl`` with their ``step``."""
        for row in rows:
            self.check(int(row["step"]), row)

    def fatal(self, alarms: Sequence[Alarm]) -> Alarm | None:
        """The first of the step's alarms that ends the run; None: it goes on."""
        return next((alarm for alarm in alarms if self._ends_run(alarm.name)), None)

    def _ends_run(self, name: str) -> bool:
        too_often = name == "not_finite" and self.skipped_in_a_row >= self._config.max_skipped
        return too_often or name in self._config.stop_on

    def _is_due(self, name: str, step: int) -> bool:
        return name not in self._rang or step - self._rang[name] >= REPEAT_STEPS or self._ends_run(name)

    def _judge(self, values: dict[str, float]) -> Verdicts:
        """Judge a step's finite values, and keep what later steps need of them."""
        if LOST in values and values.get(KEPT, math.nan) + values[LOST] > 0:
            values = values | {LOST_SHARE: values[LOST] / (values[LOST] + values[KEPT])}
        if not self._compares_groups:
            values = {name: value for name, value in values.items() if name != ZERO_VARIANCE}
        for name in WINDOWED:
            if name in values:
                self._windows[name].append(values[name])
        verdicts: Verdicts = {
            name: self._beyond(bound, values) for name, bound in BOUNDS.items() if bound.metric in values
        }
        if CALL_RATE in values:
            verdicts["no_calls"] = self._calls_stopped()
        return verdicts | self._spikes(values) | self._skipped(values)

    def _mean(self, metric: str) -> tuple[float, str]:
        """The mean over the window, and how many steps that are, in words."""
        window = self._windows[metric]
        return fmean(window), f"over {len(window)} step{'s' if len(window) > 1 else ''}"

    def _beyond(self, bound: Bound, values: dict[str, float]) -> str | None:
        mean, steps = self._mean(bound.metric)
        limit: float = getattr(self._config, bound.setting)
        if mean >= limit if bound.is_low else mean <= limit:
            return None
        side = "below" if bound.is_low else "above"
        saw = f"{bound.what} {mean:.3g} {steps}, {side} health.{bound.setting} {limit:.3g}"
        # whether all are right or all are wrong decides what to do
        is_explained = bound.metric == ZERO_VARIANCE and ACCURACY in values
        return f"{saw}, accuracy {values[ACCURACY]:.3g}" if is_explained else saw

    def _calls_stopped(self) -> str | None:
        mean, steps = self._mean(CALL_RATE)
        best, low = self._best_call_rate, self._config.call_rate_low
        self._best_call_rate = max(best, mean)
        if mean >= low or best <= ONCE_CALLED * low:
            return None
        return f"call rate {mean:.3g} {steps}, was {best:.3g}"

    def _spikes(self, values: dict[str, float]) -> Verdicts:
        """A gradient's norm against the median of the steps before, once there are enough of them."""
        judged, spikes = False, []
        for name in GRADIENT_NORMS:
            if name not in values:
                continue
            window, norm = self._windows[name], values[name]
            usual = median(window) if len(window) == self._config.window else 0.0
            if usual > 0:
                judged = True
                if norm > self._config.spike * usual:
                    spikes.append(f"{name} {norm:.3g}, {norm / usual:.3g} times the median of {len(window)} before")
            window.append(norm)
        return {"gradient_spike": "; ".join(spikes) or None} if judged else {}

    def _skipped(self, values: dict[str, float]) -> Verdicts:
        """Updates that changed nothing because their gradient was not finite."""
        judged, seen = False, []
        for model in MODELS:
            skipped = values.get(f"{model}/skipped")
            if skipped is None:
                continue
            # Where the number of updates is not told, one that was skipped is taken for all of them.
            updates = max(skipped, values.get(f"{model}/updates", 1.0))
            if not updates:
                continue
            judged = True
            self._skipped_in_a_row[model] = self._skipped_in_a_row[model] + 1 if skipped == updates else 0
            if skipped:
                seen.append(f"{model} {skipped:.0f} of {updates:.0f}")
        if not judged:
            return {}
        if not seen:
            return {"not_finite": None}
        row = self.skipped_in_a_row
        ending = f"; none applied for {row} step{'s' if row > 1 else ''}" if row else ""
        return {"not_finite": f"updates skipped: {', '.join(seen)}{ending}"}
