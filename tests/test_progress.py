from __future__ import annotations

import io
import subprocess
import sys

import pytest

from retool.progress import PLAIN_EVERY_S, Figure, Progress, format_figure, format_seconds


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock | None = None) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(file=out, clock=clock or Clock()), out


def test_a_stage_leaves_one_line_with_its_time_and_its_latest_figures() -> None:
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("SFT", total=3) as stage:
        for loss in (3.0, 2.0, 1.0):
            clock.now += 0.5
            stage.advance(loss=loss)
    assert out.getvalue().splitlines() == ["SFT: 0/3", "✓ SFT: 1.5 s  3/3  loss 1"]


def test_plain_lines_are_seldom_however_many_steps_there_are() -> None:
    clock = Clock()
    progress, out = plain(clock)
    steps, step_s = 1000, 0.1
    with progress.stage("RL", total=steps) as stage:
        for _ in range(steps):
            clock.now += step_s
            stage.advance()
    between = out.getvalue().splitlines()[1:-1]
    assert len(between) == pytest.approx(steps * step_s / PLAIN_EVERY_S, abs=2)


def test_plain_text_has_no_control_characters() -> None:
    progress, out = plain()
    with progress.stage("RL") as stage:
        stage.advance(reward=-0.5)
    progress.table("T", ["a"], [["b"]])
    assert all(character == "\n" or character.isprintable() for character in out.getvalue())


def test_a_failing_stage_says_so_and_hands_the_exception_on() -> None:
    progress, out = plain()
    with pytest.raises(KeyError), progress.stage("RL", total=5) as stage:
        stage.advance(reward=0.25)
        raise KeyError("x")
    assert out.getvalue().splitlines()[-1] == "✗ RL: stopped after 0.0 s  1/5  reward 0.25"


def test_quiet_prints_nothing() -> None:
    out = io.StringIO()
    for live in (False, True):
        progress = Progress(quiet=True, file=out, live=live)
        with progress.stage("RL", total=5) as stage:
            stage.advance(reward=0.25)
        progress.line("hello")
        progress.table("T", ["a"], [["b"]])
    assert out.getvalue() == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_ragged_table_is_refused(quiet: bool) -> None:
    progress = Progress(quiet=quiet, file=io.StringIO())
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        progress.table("T", ["a", "b"], [[1]])


def test_a_plain_table_is_aligned_with_numbers_to_the_right() -> None:
    progress, out = plain()
    progress.table("Results", ["stage", "n"], [["base", 5], ["grpo", 12345]])
    assert out.getvalue() == "\nResults\nstage       n\n-----  ------\nbase        5\ngrpo   12,345\n\n"


def test_an_empty_table_shows_its_columns() -> None:
    progress, out = plain()
    progress.table("Results", ["stage", "n"], [])
    assert "stage  n" in out.getvalue()


def test_live_stages_nest_and_leave_their_lines_and_the_cursor() -> None:
    out = io.StringIO()
    progress = Progress(file=out, live=True)
    with progress.stage("outer", total=2) as outer:
        outer.advance(loss=0.5)
        with progress.stage("inner [/x]") as inner:
            inner.advance(3, note="a [b] c")
        progress.line("between [/bold]")
        outer.advance()
    progress.table("T [/i]", ["a"], [["[/b]"]])
    text = out.getvalue()
    assert "✓ inner [/x]: " in text
    assert "3  note a [b] c" in text
    assert "between [/bold]" in text
    assert "✓ outer: " in text
    assert "T [/i]" in text and "[/b]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_failing_live_stage_gives_the_cursor_back() -> None:
    out = io.StringIO()
    progress = Progress(file=out, live=True)
    with pytest.raises(KeyboardInterrupt), progress.stage("RL"):
        raise KeyboardInterrupt
    assert out.getvalue().index("\x1b[?25h") < out.getvalue().index("✗ RL: stopped")
    with progress.stage("again"):
        pass
    assert "✓ again" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (1e-06, "1e-06"),
        (-0.5, "-0.5"),
        (1234.5, "1,234"),
        (12345, "12,345"),
        (0, "0"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("x", "x"),
    ],
)
def test_figures_are_short(value: Figure, text: str) -> None:
    assert format_figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (125.2, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rich_is_loaded_for_a_terminal_only() -> None:
    program = (
        "import sys; from retool.progress import Progress\n"
        "p = Progress()\n"
        "with p.stage('x', 1) as s: s.advance()\n"
        "p.table('t', ['a'], [[1]])\n"
        "sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0
