"""Curves as inline SVG. matplotlib draws with placeholder colours, which become the page's CSS variables, so that one
picture serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from retool.metrics import definition
from retool.report.load import Curve, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0101", "#0a0202", "#0a0303")
"""The run itself, the run set against it, what came before them."""
VARIABLES = {
    INK: "--ink",
    FAINT: "--muted",
    GRID: "--rule",
    SERIES[0]: "--series-1",
    SERIES[1]: "--series-2",
    SERIES[2]: "--series-3",
}
DASHES = ("-", (0, (5, 2)), ":")
"""Lines differ in more than their colour."""
VALIDATION = re.compile(r"val-core/(.+)/acc/mean@\d+")
FONT_SIZE = 8.0
NARROW_SPACE = "\u202f"
"""Keeps a number and its % on one line."""
SVG_SALT = "retool"
"""Fixes the ids inside an SVG: the same numbers make the same file."""


@dataclass(frozen=True)
class Panel:
    """One metric over the steps."""

    title: str
    names: tuple[str, ...]
    """The first of these that the run has is drawn."""
    percent: bool = False
    log: bool = False
    caption: str = ""
    """Where it is empty, the metric's definition."""


PANELS = (
    Panel("Trajectories that call the tool", ("tool/call_rate",), percent=True),
    Panel(
        "Runs of code that succeed",
        ("tool/status/ok",),
        percent=True,
        caption="Share of runs that ended with status ok: exit code 0, within every limit.",
    ),
    Panel("Turns", ("num_turns/mean",)),
    Panel("Response length, tokens", ("response_length/mean",)),
    Panel("Reward", ("critic/score/mean",)),
    Panel("Entropy, nats", ("actor/entropy",)),
    Panel("Groups without a signal", ("group/zero_variance_share",), percent=True),
    Panel(
        "Log-probability gap, sampler to learner",
        ("training/rollout_logprob_gap_max", "training/rollout_logprob_gap_mean", "training/rollout_probs_diff_max"),
        log=True,
    ),
    Panel("Lines of code in a run", ("code/lines_mean",)),
)
LOSS = Panel("Cold start: loss, nats a token", ("train/loss",))


@dataclass(frozen=True)
class Figure:
    """An SVG with what a reader needs who does not see it."""

    title: str
    svg: Markup
    caption: str
    alt: str
    narrow: Markup | None = None
    """The same for small screens, where the wide one would be illegible."""


def _canvas(width: float, height: float) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    figure = Canvas(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=FONT_SIZE, length=0, pad=4)
    axes.set_xlabel("step", color=FAINT, fontsize=FONT_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, axes


def _finish(figure: Any, prefix: str) -> Markup:
    """The figure as SVG that scales with the page and whose ids are its own."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": SVG_SALT, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


def _percent(axes: Axes, top: float = 1.0) -> None:
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    axes.set_ylim(-0.02, top * 1.04)
    axes.yaxis.set_major_locator(MultipleLocator(0.25))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))


def shown(value: float, percent: bool = False) -> str:
    """A number as a person would write it."""
    if percent:
        return f"{100 * value:.0f}{NARROW_SPACE}%"
    return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _described(title: str, name: str, curves: Sequence[Curve], percent: bool) -> str:
    parts = []
    for curve in curves:
        steps, values = curve.points(name)
        if values:
            ends = f"{shown(values[0], percent)} at step {steps[0]:.0f} to {shown(values[-1], percent)}"
            parts.append(f"{curve.title}: from {ends} at step {steps[-1]:.0f}")
    return f"{title}. {'; '.join(parts)}."


def draw_panel(panel: Panel, curves: Sequence[Curve]) -> Figure | None:
    """One small picture; None where no run has the metric."""
    name = next((n for n in panel.names if any(curve.points(n)[0] for curve in curves)), None)
    if name is None:
        return None
    figure, axes = _canvas(3.6, 2.15)
    lowest = 0.0
    for curve, colour, dash in zip(curves, SERIES, DASHES, strict=False):
        steps, values = curve.points(name)
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.6, solid_capstyle="round")
        if len(steps) == 1:
            axes.plot(steps, values, "o", color=colour, markersize=3)
        lowest = min([lowest, *values])
    drawn = [v for curve in curves for v in curve.points(name)[1]]
    if panel.percent:
        _percent(axes)
    elif panel.log and min(drawn) > 0:
        axes.set_yscale("log")
        axes.set_ylim(10.0 ** _exponent(min(drawn)), 10.0 ** (_exponent(max(drawn)) + 1))
        axes.minorticks_off()
    elif lowest >= 0:
        axes.set_ylim(0, max(drawn) * 1.1 or 1.0)
    caption = panel.caption or definition(name) or ""
    return Figure(
        panel.title, _finish(figure, _slug(name)), caption, _described(panel.title, name, curves, panel.percent)
    )


def _exponent(value: float) -> int:
    """The exponent of the power of ten at or below ``value``."""
    return int(f"{value:e}".split("e")[1])


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


# --- the picture at the top: accuracy -------------------------------------------------------------------------------


def _draw_accuracy(report: Report, width: float, height: float, prefix: str) -> Markup:
    figure, axes = _canvas(width, height)
    last = max(row["step"] for curve in report.curves for row in curve.rows)
    for curve, colour, dash in zip(report.curves, SERIES, DASHES, strict=False):
        steps, values = curve.points("acc/mean")
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.8, solid_capstyle="round")
        low_steps, low = curve.points("acc/ci95_low")
        high_steps, high = curve.points("acc/ci95_high")
        if low_steps == high_steps and low:
            axes.fill_between(low_steps, low, high, color=colour, alpha=0.16, linewidth=0)
        for name in sorted(n for n in curve.names() if VALIDATION.fullmatch(n)):
            axes.plot(
                *curve.points(name), "o", color=colour, markersize=4.2, markerfacecolor="none", markeredgewidth=1.2
            )
        _mark_stage(axes, report, curve.key, steps[-1] if steps else last, colour)
    _mark_stage(axes, report, "sft", 0, SERIES[2])
    axes.set_xlim(-0.02 * last, last * 1.02)
    _percent(axes)
    return _finish(figure, prefix)


def _mark_stage(axes: Axes, report: Report, key: str, step: float, colour: str) -> None:
    """The final evaluation of a stage as a diamond with its interval."""
    stage = report.stage(key)
    accuracy = stage.number("accuracy") if stage else None
    if stage is None or accuracy is None:
        return
    if stage.interval:
        axes.plot([step, step], stage.interval, color=colour, linewidth=1.6, clip_on=False, zorder=4)
    axes.plot([step], [accuracy], "D", color=colour, markersize=6.5, clip_on=False, zorder=5)


def _accuracy_caption(report: Report) -> str:
    parts = ["Line: each step's training batch, with its 95 % interval."]
    if any(VALIDATION.fullmatch(name) for curve in report.curves for name in curve.names()):
        parts.append("Rings: evaluations during training.")
    if any(stage.number("accuracy") is not None for stage in report.stages):
        parts.append("Diamonds with a bar: the evaluations above with their 95 % intervals, the cold start at step 0.")
    return " ".join(parts)


def draw_accuracy(report: Report) -> Figure | None:
    """Accuracy over the steps with intervals, evaluations during training as rings and the final ones as diamonds."""
    if not any(curve.points("acc/mean")[0] for curve in report.curves):
        return None
    return Figure(
        title="Accuracy",
        svg=_draw_accuracy(report, 9.4, 3.5, "accuracy"),
        caption=_accuracy_caption(report),
        alt=_described("Accuracy on each step's training batch", "acc/mean", report.curves, percent=True),
        narrow=_draw_accuracy(report, 4.3, 3.3, "accuracy-narrow"),
    )


def draw_panels(report: Report) -> list[Figure]:
    """The small pictures, those that the run has numbers for."""
    drawn = [draw_panel(panel, report.curves) for panel in PANELS] if report.curves else []
    if report.sft is not None:
        drawn.append(draw_panel(LOSS, [report.sft]))
    return [figure for figure in drawn if figure is not None]
