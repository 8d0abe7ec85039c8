"""Each alarm with a case that rings and a near one that does not; memory over steps and over interruptions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from retool.config import ALARMS, HealthConfig, Recipe, apply_override, make_recipe
from retool.health import ADVICE, BOUNDS, REPEAT_STEPS, Alarm, Monitor
from retool.metrics import definition
from retool.store.files import JsonlTracker, read_metrics

PAGE = Path(__file__).parents[1] / "docs" / "health.md"
NAN = math.nan
Row = dict[str, float]
CALLS, MALFORMED, ENTROPY = "tool/call_rate", "tool/malformed_share", "actor/entropy"
GAP, EQUAL, CUT = "training/rollout_logprob_gap_mean", "group/zero_variance_share", "response_length/clip_ratio"
LOST, KEPT = "infra/trajectories", "rollout/trajectories"
NORM, CRITIC_NORM = "actor/grad_norm", "critic/grad_norm"
SKIPPED, UPDATES = "actor/skipped", "actor/updates"


def rows(metric: str, *values: float) -> list[Row]:
    return [{metric: value} for value in values]


def rung(steps: Iterable[Row], **settings: object) -> list[Alarm]:
    """All alarms of a run of these steps, numbered from 1."""
    monitor = Monitor(HealthConfig.model_validate(settings))
    return [alarm for step, metrics in enumerate(steps, start=1) for alarm in monitor.check(step, metrics)]


def when(steps: Iterable[Row], **settings: object) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.step) for alarm in rung(steps, **settings)]


BAD: dict[str, list[Row]] = {
    "no_calls": rows(CALLS, 0.11, 0.0, 0.0, 0.0, 0.0, 0.0),
    "malformed": rows(MALFORMED, 0.29, 0.29, 0.29, 0.29, 0.35),
    "entropy_collapse": rows(ENTROPY, 0.011, 0.011, 0.011, 0.011, 0.005),
    "entropy_explosion": rows(ENTROPY, 4.9, 4.9, 4.9, 4.9, 5.5),
    "logprob_gap": rows(GAP, 0.049, 0.049, 0.049, 0.049, 0.06),
    "zero_variance": rows(EQUAL, 0.89, 0.89, 0.89, 0.89, 0.95),
    "cut_short": rows(CUT, 0.49, 0.49, 0.49, 0.49, 0.6),
    "infra": [{LOST: 4.0, KEPT: 96.0}] * 4 + [{LOST: 10.0, KEPT: 90.0}],
    "gradient_spike": rows(NORM, 1.0, 2.0, 3.0, 4.0, 5.0, 30.1),
    "not_finite": [{SKIPPED: 0, UPDATES: 2}, {SKIPPED: 1, UPDATES: 2}],
}
"""Rings in its last step, and only there."""
GOOD: dict[str, list[Row]] = {
    "no_calls": rows(CALLS, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0),  # never above five times the limit
    "malformed": rows(MALFORMED, 0.29, 0.29, 0.29, 0.29, 0.33),
    "entropy_collapse": rows(ENTROPY, 0.011, 0.011, 0.011, 0.011, 0.007),
    "entropy_explosion": rows(ENTROPY, 4.9, 4.9, 4.9, 4.9, 5.3),
    "logprob_gap": rows(GAP, 0.049, 0.049, 0.049, 0.049, 0.053),
    "zero_variance": rows(EQUAL, 0.89, 0.89, 0.89, 0.89, 0.93),
    "cut_short": rows(CUT, 0.49, 0.49, 0.49, 0.49, 0.53),
    "infra": [{LOST: 4.0, KEPT: 96.0}] * 4 + [{LOST: 8.0, KEPT: 92.0}],
    "gradient_spike": rows(NORM, 1.0, 2.0, 3.0, 4.0, 5.0, 29.9),
    "not_finite": [{SKIPPED: 0, UPDATES: 2}, {SKIPPED: 0, UPDATES: 0}],
}


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_rings_beyond_its_limit_and_not_before(name: str) -> None:
    assert when(BAD[name]) == [(name, len(BAD[name]))]
    assert when(GOOD[name]) == []


LIMITS = {name: bound.setting for name, bound in BOUNDS.items()} | {
    "no_calls": "call_rate_low",
    "gradient_spike": "spike",
}
WIDER = {
    "no_calls": 0.0,
    "malformed": 0.31,
    "entropy_collapse": 0.009,
    "entropy_explosion": 5.1,
    "logprob_gap": 0.06,
    "zero_variance": 0.91,
    "cut_short": 0.52,
    "infra": 0.06,
    "gradient_spike": 11.0,
}


@pytest.mark.parametrize("name", WIDER)
def test_each_alarm_heeds_its_own_setting(name: str) -> None:
    assert when(BAD[name], **{LIMITS[name]: WIDER[name]}) == []


def test_no_calls_rings_when_the_windows_mean_has_fallen() -> None:
    """Five steps of 0.6, then none: the mean of five reaches 0 with the fifth step without a call, not before."""
    steps = rows(CALLS, *[0.62] * 5, *[0.0] * 5)
    assert when(steps) == [("no_calls", 10)]
    assert "call rate 0 over 5 steps, was 0.62" in rung(steps)[0].line


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_a_run_that_never_called_much_is_not_told_that_it_stopped(rate: float) -> None:
    assert when(rows(CALLS, *[rate] * 10, *[0.0] * 10)) == []


def test_calls_that_come_back_and_go_again_ring_again() -> None:
    steps = rows(CALLS, 0.5, 0.0, 0.5, 0.0)
    assert when(steps, window=1) == [("no_calls", 2), ("no_calls", 4)]


def test_the_window_says_over_how_many_steps_a_mean_is_taken() -> None:
    assert when(rows(CUT, 0.2, 0.6, 0.6), window=1) == [("cut_short", 2)]
    assert when(rows(CUT, 0.2, 0.6, 0.6, 0.6), window=3) == [("cut_short", 4)]


def test_the_beginning_of_a_run_is_judged_by_the_steps_there_are() -> None:
    (alarm,) = rung([{LOST: 20, KEPT: 0}])
    assert (alarm.name, alarm.step) == ("infra", 1)
    assert "share of trajectories lost 1 over 1 step, above health.infra_high 0.05" in alarm.line


def test_lost_trajectories_are_not_judged_without_the_number_of_kept_ones() -> None:
    assert when([{LOST: 20}, {KEPT: 20}, {LOST: 0, KEPT: 0}]) == []


def test_a_spike_needs_a_full_window_of_norms_before_it() -> None:
    assert when(rows(NORM, 1, 1, 1, 1, 100)) == []
    assert when(rows(NORM, 1, 1, 1, 1, 1, 100)) == [("gradient_spike", 6)]


def test_a_spike_of_before_does_not_hide_the_next() -> None:
    """The median stays where the mean would have gone up."""
    assert when(rows(NORM, 1, 1, 1, 1, 1, 1000, 1, 1000)) == [("gradient_spike", 6), ("gradient_spike", 8)]


def test_the_critics_gradient_is_judged_by_itself() -> None:
    steps = [{NORM: 100.0, CRITIC_NORM: 1.0}] * 5 + [{NORM: 100.0, CRITIC_NORM: 20.0}]
    (alarm,) = rung(steps)
    assert alarm.saw == "critic/grad_norm 20, 20 times the median of 5 before"


def test_a_gradient_of_nothing_is_no_measure_of_a_spike() -> None:
    assert when(rows(NORM, 0, 0, 0, 0, 0, 1)) == []


def test_groups_of_equal_rewards_are_no_fault_where_groups_are_not_compared() -> None:
    monitor = Monitor(HealthConfig(), compares_groups=False)
    assert monitor.check(1, {EQUAL: 1.0}) == []
    assert [a.name for a in monitor.check(2, {EQUAL: 1.0, CUT: 1.0})] == ["cut_short"]


@pytest.mark.parametrize("accuracy", [0.02, 0.98])
def test_zero_variance_tells_whether_all_are_right_or_all_are_wrong(accuracy: float) -> None:
    (alarm,) = rung([{EQUAL: 1.0, "acc/mean": accuracy}])
    assert alarm.saw.endswith(f"accuracy {accuracy}")


def test_the_alarms_of_a_step_come_in_the_order_of_their_table() -> None:
    step = {SKIPPED: 1.0, CUT: 1.0, ENTROPY: 0.0, MALFORMED: 1.0}
    assert [alarm.name for alarm in rung([step])] == ["malformed", "entropy_collapse", "cut_short", "not_finite"]


@pytest.mark.parametrize(
    ("steps", "setting", "off", "on"),
    [
        (rows(MALFORMED, 1.0), "malformed_high", 1.0, 0.99),
        (rows(ENTROPY, 0.0), "entropy_low", 0.0, 1e-6),
        (rows(EQUAL, 1.0), "zero_variance_high", 1.0, 0.99),
        (rows(CUT, 1.0), "cut_high", 1.0, 0.99),
        ([{LOST: 9.0, KEPT: 0.0}], "infra_high", 1.0, 0.99),
        (rows(CALLS, *[1.0] * 5, *[0.0] * 5), "call_rate_low", 0.0, 0.19),
    ],
)
def test_a_limit_at_its_end_switches_its_check_off(steps: list[Row], setting: str, off: float, on: float) -> None:
    assert when(steps, **{setting: off}) == []
    assert len(when(steps, **{setting: on})) == 1


# Missing and not finite


@pytest.mark.parametrize("hole", [None, NAN, math.inf], ids=["missing", "nan", "inf"])
@pytest.mark.parametrize("name", [name for name in ALARMS if name != "not_finite"])
def test_what_is_not_there_is_not_judged_and_enters_no_window(name: str, hole: float | None) -> None:
    """Holes between a run's steps change nothing but the steps' numbers."""
    steps: list[Row] = []
    for row in BAD[name]:
        steps += [row, {} if hole is None else dict.fromkeys(row, hole)]
    assert when(steps) == [(name, len(steps) - 1)]


def test_an_alarm_that_is_not_judged_stays_as_it_was() -> None:
    """A step without an update has no entropy: the alarm of the step before is not off because of that."""
    steps = [{ENTROPY: 0.001}, {}, {ENTROPY: 0.001}, {ENTROPY: NAN}, {ENTROPY: 0.001}]
    assert when(steps) == [("entropy_collapse", 1)]
    assert when([*rows(NORM, 1, 1, 1, 1, 1, 50), {}, {NORM: 50}]) == [("gradient_spike", 6)]
    assert when([skipped(1), {}, skipped(0, 0), skipped(1)]) == [("not_finite", 1)]


# No flooding


def test_an_alarm_that_stays_on_is_given_every_ten_steps() -> None:
    assert when(rows(CUT, *[0.9] * 25)) == [("cut_short", step) for step in (1, 1 + REPEAT_STEPS, 1 + 2 * REPEAT_STEPS)]


def test_an_alarm_that_was_off_is_given_at_once() -> None:
    assert when(rows(CUT, 0.9, 0.9, 0.1, 0.9, 0.9), window=1) == [("cut_short", 1), ("cut_short", 4)]
    assert when([skipped(1), skipped(0), skipped(1)]) == [("not_finite", 1), ("not_finite", 3)]


def test_one_alarm_does_not_hold_another_back() -> None:
    assert when([{CUT: 0.9}, {CUT: 0.9, MALFORMED: 0.9}]) == [("cut_short", 1), ("malformed", 2)]


# What ends a run


def test_only_an_alarm_that_is_named_ends_the_run() -> None:
    step = {CUT: 1.0, MALFORMED: 1.0}
    for stop_on, ending in [([], None), (["no_calls"], None), (["cut_short"], "cut_short"), (ALARMS, "malformed")]:
        monitor = Monitor(HealthConfig(stop_on=list(stop_on)))
        fatal = monitor.fatal(monitor.check(1, step))
        assert (fatal and fatal.name) == ending
        assert monitor.fatal([]) is None


def test_an_alarm_that_ends_the_run_is_never_held_back() -> None:
    """A run that was ended and is taken up without a change ends again, not ten steps later."""
    monitor = Monitor(HealthConfig(stop_on=["cut_short"]))
    monitor.replay([{"step": 1, CUT: 1.0}])
    fatal = monitor.fatal(monitor.check(2, {CUT: 1.0}))
    assert fatal is not None and fatal.step == 2


def endings(steps: Iterable[Row], **settings: object) -> list[bool]:
    monitor = Monitor(HealthConfig.model_validate(settings))
    return [monitor.fatal(monitor.check(n, metrics)) is not None for n, metrics in enumerate(steps, start=1)]


def skipped(number: float, updates: float = 2) -> Row:
    return {SKIPPED: number, UPDATES: updates}


@pytest.mark.parametrize(
    ("steps", "fatal_step"),
    [
        ([skipped(2)] * 3, 3),
        ([skipped(2), skipped(2), skipped(0), skipped(2), skipped(2)], None),
        ([skipped(2), skipped(2), skipped(1), skipped(2), skipped(2)], None),  # one of two was applied
        ([skipped(1)] * 9, None),
        ([skipped(2), skipped(0, 0), skipped(2), {}, skipped(2)], 5),  # a step without an update says nothing
        ([skipped(2), skipped(NAN), skipped(2), skipped(2)], 4),
        ([{SKIPPED: 1}] * 3, 3),  # the number of updates is not told
        ([{"critic/skipped": 4, "critic/updates": 4}] * 3, 3),
        ([{"critic/skipped": 1, "critic/updates": 4}] * 9, None),
        ([skipped(2) | {"critic/skipped": 0, "critic/updates": 2}] * 3, 3),  # a critic that learns mends no actor
    ],
)
def test_a_run_whose_updates_are_all_skipped_ends(steps: list[Row], fatal_step: int | None) -> None:
    assert endings(steps) == [n == fatal_step for n in range(1, len(steps) + 1)]


def test_how_many_skipped_steps_end_a_run_is_a_setting() -> None:
    assert endings([skipped(2)] * 2, max_skipped=1) == [True, True]
    assert endings([skipped(2)] * 5, max_skipped=5) == [False] * 4 + [True]


def test_a_single_skipped_update_ends_the_run_where_that_is_asked_for() -> None:
    assert endings([skipped(0), skipped(1)], stop_on=["not_finite"]) == [False, True]


def test_skipped_steps_are_counted_and_told() -> None:
    monitor = Monitor(HealthConfig(max_skipped=2))
    assert monitor.skipped_in_a_row == 0
    (first,) = monitor.check(1, skipped(2))
    (second,) = monitor.check(2, skipped(2) | {"critic/skipped": 1, "critic/updates": 3})
    assert first.saw == "updates skipped: actor 2 of 2; none applied for 1 step"
    assert second.saw == "updates skipped: actor 2 of 2, critic 1 of 3; none applied for 2 steps"
    assert monitor.skipped_in_a_row == 2
    monitor.check(3, skipped(0))
    assert monitor.skipped_in_a_row == 0


# Interruptions


def troubled_run() -> list[Row]:
    """Forty steps in which every alarm rings, some stay on, and metrics are missing or not finite."""
    steps = []
    for n in range(1, 41):
        bad = 12 <= n < 33
        row: Row = {
            CALLS: 0.0 if bad else 0.5,
            EQUAL: 0.97 if bad else 0.4,
            CUT: 0.8 if n % 7 < 4 else 0.1,
            LOST: 30 if bad else 0,
            KEPT: 98,
            UPDATES: 2,
            SKIPPED: 1 if n % 6 == 0 else 2 if n in (20, 21) else 0,
            NORM: NAN if n in (20, 21) else 40.0 if n == 15 else 1.0 + n / 100,
            GAP: math.inf if n == 14 else 0.2 if bad else 0.01,
        }
        if n % 3:
            row[ENTROPY] = 0.001 if bad else 9.0 if n > 35 else 0.3
        if n % 5:
            row[MALFORMED] = 0.6 if bad else 0.01
        steps.append(row)
    return steps


def test_the_troubled_run_rings_every_alarm() -> None:
    assert {alarm.name for alarm in rung(troubled_run())} == set(ALARMS)


@pytest.mark.parametrize("done", range(0, 41, 3))
def test_a_run_that_is_taken_up_judges_as_one_that_was_not_interrupted(done: int, tmp_path: Path) -> None:
    """Through the file itself, in which what is not finite becomes null."""
    steps = troubled_run()
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for n, metrics in enumerate(steps[:done], start=1):
        tracker.log(n, metrics)
    tracker.close()
    monitor = Monitor(HealthConfig())
    monitor.replay(read_metrics(tmp_path / "metrics.jsonl"))
    resumed = [alarm for n in range(done + 1, 41) for alarm in monitor.check(n, steps[n - 1])]
    assert resumed == [alarm for alarm in rung(steps) if alarm.step > done]


def test_skipped_steps_before_an_interruption_count() -> None:
    monitor = Monitor(HealthConfig(max_skipped=3))
    monitor.replay([{"step": 1.0} | skipped(2), {"step": 2.0} | skipped(2)])
    assert monitor.fatal(monitor.check(3, skipped(2))) is not None


# Words


def longest(name: str) -> Alarm:
    """The alarm with numbers that are as long as they come."""
    shares = dict.fromkeys([MALFORMED, GAP, EQUAL, CUT, "acc/mean"], 0.98765)
    bad: dict[str, list[Row]] = {
        "no_calls": rows(CALLS, *[0.98765] * 10, *[1.2345e-5] * 10),
        "entropy_collapse": rows(ENTROPY, *[1.2345e-5] * 11),
        "entropy_explosion": rows(ENTROPY, *[12.345] * 11),
        "infra": [{LOST: 4567.0, KEPT: 1234.0}] * 11,
        "gradient_spike": rows(NORM, *[0.012345] * 10, 98765.4),
        "not_finite": [skipped(16, 16) | {"critic/skipped": 16, "critic/updates": 16}] * 11,
    }
    monitor = Monitor(HealthConfig(window=10))
    found = []
    for n, row in enumerate(bad.get(name, [shares] * 11), start=123_450):
        found += [alarm for alarm in monitor.check(n, row) if alarm.name == name]
    return found[-1]


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_one_line_that_can_be_read(name: str) -> None:
    alarm = longest(name)
    assert alarm.line.startswith(f"{name} at step {alarm.step}: {alarm.saw} — usually ")
    assert alarm.line.endswith(f"{ADVICE[name].means} — try {ADVICE[name].attempt}")
    assert "\n" not in alarm.line
    assert len(alarm.line) <= 300


def test_there_is_advice_for_every_alarm_and_for_no_other() -> None:
    assert set(ADVICE) == set(ALARMS)


@pytest.mark.parametrize("name", ALARMS)
def test_the_page_says_what_the_alarm_says(name: str) -> None:
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert len(found) == 1
    cells = [cell.strip() for cell in found[0].strip("|").split("|")]
    assert cells[2:] == [*ADVICE[name]]
    if name in LIMITS:
        default = getattr(HealthConfig(), LIMITS[name])
        assert re.search(rf"`{LIMITS[name]}` \({default:g}\b", cells[1])
    for metric in re.findall(r"`(\w+/\w+)`", cells[1]):
        assert metric in {key for row in BAD[name] for key in row} | {CRITIC_NORM, "critic/skipped"}


SECTIONS = "|".join(Recipe.model_fields)
WORDS = [*(text for advice in ADVICE.values() for text in advice), PAGE.read_text(encoding="utf-8")]


def test_every_setting_that_is_named_exists() -> None:
    known = Recipe().model_dump()
    for word in {w for text in WORDS for w in re.findall(rf"\b(?:{SECTIONS})(?:\.\w+)+", text)}:
        node: object = known
        for part in word.split("."):
            assert isinstance(node, dict) and part in node, word
            node = node[part]


def test_every_value_that_is_advised_is_accepted() -> None:
    overrides = {w for text in WORDS for w in re.findall(rf"\b(?:{SECTIONS})(?:\.\w+)+=[\w.]*\w", text)}
    assert len(overrides) >= 10
    for override in overrides:
        tree: dict[str, object] = {}
        apply_override(tree, override)
        make_recipe(tree)


@pytest.mark.parametrize("metric", [CALLS, MALFORMED, ENTROPY, GAP, EQUAL, CUT, LOST, NORM, SKIPPED, UPDATES])
def test_what_is_read_is_what_is_logged(metric: str) -> None:
    assert definition(metric) is not None
    assert any(metric in row for steps in BAD.values() for row in steps)
