"""What a long job shows while it works: live bars on a terminal, plain lines anywhere else, nothing when quiet.

    with progress.stage("SFT", total=300) as stage:
        for batch in batches:
            stage.advance(loss=0.71)

On a terminal a bar lives under the text and is gone when its stage ends. Elsewhere (a file, a pipe) there is at most
one line every ``PLAIN_EVERY_S`` seconds, and no control character. Either way a stage leaves one permanent line: its
name, its steps, its time and its latest figures. rich is imported when the first bar or table is drawn on a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Figure = float | int | str

PLAIN_EVERY_S = 5.0
"""Often enough to see that a job lives, seldom enough to read its log afterwards."""
REFRESH_HZ = 4
"""Redraws of the bars a second; each costs about a millisecond of the core that the sandbox needs."""


def format_figure(value: Figure) -> str:
    """A number as short as it can be read: three digits, thousands separated, whole numbers whole."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < float("inf") else f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _format_figures(figures: dict[str, Figure]) -> str:
    return "  ".join(f"{name} {format_figure(value)}" for name, value in figures.items())


class Stage:
    """One part of a job, made by ``Progress.stage``."""

    def __init__(self, name: str, total: int | None, changed: Callable[[Stage], None]) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.figures: dict[str, Figure] = {}
        """The latest value of each figure, in the order of their first appearance."""
        self._changed = changed

    def advance(self, steps: int = 1, /, **figures: Figure) -> None:
        """``steps`` more are done; ``figures`` replace those of the same name. ``advance(0, …)`` only shows figures."""
        self.done += steps
        self.figures.update(figures)
        self._changed(self)

    def describe(self) -> str:
        """``12/300  loss 0.71``."""
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        return "  ".join(part for part in (count, _format_figures(self.figures)) if part)


class Progress:
    """Shows stages, lines and tables. Stages may be nested; all of it belongs to one thread.

    Args:
        quiet: print nothing at all; errors are the caller's, on stderr.
        file: where to print; None is standard output.
        live: bars; None asks the file whether it is a terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        file: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self._file = sys.stdout if file is None else file
        self._live = self._file.isatty() and os.environ.get("TERM") != "dumb" if live is None else live
        self._clock = clock
        self._console_made: Console | None = None
        self._bars: Bars | None = None
        self._open: dict[Stage, TaskID] = {}
        self._last_plain = clock()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Open a stage of ``total`` steps (None: not known beforehand) and close it with its permanent line, which
        says so where an exception ended it."""
        stage = Stage(name, total, self._changed)
        start = self._clock()
        self._begin(stage)
        ending = "stopped after "
        try:
            yield stage
            ending = ""
        finally:
            self._end(stage)
            took = format_seconds(self._clock() - start)
            mark = "✗" if ending else "✓"
            self.line(f"{mark} {name}: {ending}{took}  {stage.describe()}".rstrip())

    def line(self, text: str = "") -> None:
        """Print one permanent line."""
        if self.quiet:
            return
        if self._live:
            self._console().print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Figure]]) -> None:
        """Print a table; numbers stand to the right.

        Raises:
            ValueError: a row is not as long as ``columns``.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: a row of {len(row)} cells under {len(columns)} columns")
        if self.quiet:
            return
        right = [any(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
        cells = [[format_figure(cell) for cell in row] for row in rows]
        if self._live:
            self._rich_table(title, columns, cells, right)
        else:
            self._plain_table(title, columns, cells, right)

    def _rich_table(self, title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for column, is_right in zip(columns, right, strict=True):
            table.add_column(Text(column), justify="right" if is_right else "left")
        for row in cells:
            table.add_row(*map(Text, row))
        self._console().print(table)

    def _plain_table(self, title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        print(f"\n{title}", file=self._file)
        for row in [list(columns), ["-" * width for width in widths], *cells]:
            padded = [
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(row, widths, right, strict=True)
            ]
            print("  ".join(padded).rstrip(), file=self._file)
        print(file=self._file, flush=True)

    def _console(self) -> Console:
        if self._console_made is None:
            from rich.console import Console

            self._console_made = Console(file=self._file, force_terminal=True)
        return self._console_made

    def _begin(self, stage: Stage) -> None:
        if self.quiet:
            return
        if not self._live:
            self._print_plain(stage)
            return
        if self._bars is None:
            self._bars = self._start_bars()
        self._open[stage] = self._bars.add_task(stage.name, total=stage.total, figures="")

    def _start_bars(self) -> Bars:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
        ]
        bars = Bars(*columns, console=self._console(), transient=True, refresh_per_second=REFRESH_HZ)
        bars.start()
        return bars

    def _changed(self, stage: Stage) -> None:
        if self._bars is not None:
            figures = _format_figures(stage.figures)
            self._bars.update(self._open[stage], completed=stage.done, figures=figures)
        elif not self.quiet and self._clock() - self._last_plain >= PLAIN_EVERY_S:
            self._print_plain(stage)

    def _print_plain(self, stage: Stage) -> None:
        self.line(f"{stage.name}: {stage.describe()}")
        self._last_plain = self._clock()

    def _end(self, stage: Stage) -> None:
        if self._bars is None:
            return
        self._bars.remove_task(self._open.pop(stage))
        if not self._open:
            self._bars.stop()
            self._bars = None
