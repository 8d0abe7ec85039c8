"""``retool data …``: data sets, from the hub or a local file, cleaned, as Parquet."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retool.cli.common import QUIET, show_help
from retool.errors import ConfigError, DataError

if TYPE_CHECKING:
    from retool.data.prepare import Cleaning, Report
    from retool.progress import Progress


@click.group(invoke_without_command=True)
@click.pass_context
def data(ctx: click.Context) -> None:
    """Data sets: list, prepare, look at."""
    show_help(ctx)


@data.command(name="list")
def data_list() -> None:
    """The data sets that are known by name."""
    from retool.data.sets import SETS
    from retool.progress import Progress

    rows = [
        [known.name, known.hub, known.kind, " + ".join(f"{n:,}" for n in known.published.values()), known.about]
        for known in SETS.values()
    ]
    Progress().table("Data sets", ["name", "on the hub", "holds", "rows", ""], rows)
    click.echo("Any other: a .parquet, .jsonl or .json file, or a hub name owner/name, with --column for its columns.")


OUT = click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The Parquet file to write."
)


def cleaning_options(function: Any) -> Any:
    """What commands that read a set of problems have in common."""
    for option in reversed(
        [
            click.option("--file", metavar="PATH", default="", help="A local copy of SET: a file or a folder."),
            click.option("--against", metavar="SET[=FILE]", multiple=True, help="Drop what this set holds too."),
            click.option("--ngram", type=click.IntRange(2), default=13, show_default=True, help="Words of an overlap."),
            click.option(
                "--min-share", type=click.FloatRange(0, 1), default=0.0, show_default=True,
                help="Let smaller overlaps pass: share of the evaluation problem's runs of words.",
            ),
            click.option("--split", default="", help="Which split; default: the set's first one."),
            click.option(
                "--column", "columns", metavar="FIELD=COLUMN", multiple=True,
                help="question, answer, solution, id: where.",
            ),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


@data.command(name="prepare")
@click.argument("name", metavar="SET")
@OUT
@cleaning_options
@click.option("--no-chinese", is_flag=True, help="Drop problems that hold Chinese.")
@click.option("--keep-duplicates", is_flag=True, help="Do not look for duplicates and conflicting answers.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Problems to keep at most; 0: all.")
@click.option(
    "--form",
    type=click.Choice(["messages", "tags"]),
    default="messages",
    show_default=True,
    help="Conversations: with tool calls, or as the assistant's own string with tags.",
)
@click.option("--execute", is_flag=True, help="Conversations: run every program again and compare what it prints.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds of one such run.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@QUIET
def data_prepare(
    name: str,
    out: Path,
    file: str,
    against: tuple[str, ...],
    ngram: int,
    min_share: float,
    split: str,
    columns: tuple[str, ...],
    no_chinese: bool,
    keep_duplicates: bool,
    limit: int,
    form: str,
    execute: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read a set, clean it, write it as Parquet, and say what was dropped and why.

    SET is a name from 'retool data list', a file, or a hub name owner/name.
    """
    import json

    from retool.data.prepare import Cleaning, prepare
    from retool.data.sets import SETS
    from retool.progress import Progress

    progress = Progress(quiet=quiet or as_json)
    wanted = Cleaning(chinese=not no_chinese, duplicates=keep_duplicates, against=against, ngram=ngram, share=min_share)
    known = SETS.get(name)
    if known and known.kind == "conversations":
        given = {"--split": split, "--column": columns, "--no-chinese": no_chinese,
                 "--keep-duplicates": keep_duplicates, "--limit": limit}  # fmt: skip
        if unused := ", ".join(option for option, value in given.items() if value):
            raise ConfigError(f"{unused}: for problems, and {name!r} holds conversations: leave out")
        report = _conversations(name, out, file, form, wanted, timeout if execute else None, progress)
    elif execute or form != "messages":
        raise ConfigError(f"--execute and --form are for conversations, and {name!r} holds problems: leave them out")
    else:
        report = prepare(name, out, file=file, columns=parse_columns(columns), split=split, limit=limit, wanted=wanted)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report, out, progress)


def parse_columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """``question=problem`` and the like as a mapping."""
    columns = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(f"--column {pair!r}: write FIELD=COLUMN, e.g. question=problem")
        if field.strip() in columns:
            raise ConfigError(f"--column {pair!r}: {field.strip()} has a column already; give one for each field")
        columns[field.strip()] = column.strip()
    return columns


def _conversations(
    name: str, out: Path, file: str, form: str, wanted: Cleaning, timeout_s: float | None, progress: Progress
) -> Report:
    import asyncio

    from retool.config import SandboxConfig
    from retool.data.conversion import prepare_conversations, run_again, write_differences
    from retool.sandbox.choose import open_sandbox

    report, rows = prepare_conversations(name, out, file=file, form=form, wanted=wanted)
    if timeout_s is None:
        return report
    programs = report.notes["programs"]

    async def execute() -> list[dict[str, Any]]:
        sandbox = await open_sandbox(SandboxConfig(timeout_s=timeout_s))
        try:
            with progress.stage("run the programs again", total=programs) as stage:
                return await run_again(rows, sandbox, timeout_s, on_program=lambda _: stage.advance())
        finally:
            await sandbox.close()

    write_differences(out, report, programs, asyncio.run(execute()))
    return report


def show_report(report: Report, out: Path, progress: Progress) -> None:
    """A report as a table, and where the files lie."""
    from retool.data.prepare import beside

    rows: list[list[int | str]] = [["read", report.read], ["kept", report.kept]]
    rows += [[f"dropped: {reason}", count] for reason, count in report.dropped.most_common()]
    rows += [[note, count] for note, count in report.notes.items() if count]
    progress.table(report.name, ["rows", "count"], rows)
    progress.line(f"{report.seconds:.1f} s, {report.peak_memory_mb:,} MB at the most")
    progress.line(
        f"{out}  (what was dropped: {beside(out, 'dropped.jsonl')}, the counts: {beside(out, 'report.json')})"
    )


@data.command(name="show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="From which on, counted from 0.")
def data_show(file: Path, rows: int, first: int) -> None:
    """Print rows of a prepared file: problems, or conversations."""
    from itertools import islice

    from retool.data.reading import rows as read_rows

    found = list(islice(read_rows(file), first, first + rows))
    if not found:
        raise DataError(f"{file}: has no row {first}; choose a smaller --first")
    for number, row in enumerate(found, start=first):
        click.echo(f"── row {number}" + (f", {row['id']}" if row.get("id") else ""))
        click.echo(_CONTROL.sub(lambda found: repr(found.group())[1:-1], "\n".join(_lines(row))))
        click.echo()
    sys.stdout.flush()


# What a terminal would obey instead of showing it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _lines(row: dict[str, Any]) -> list[str]:
    if isinstance(row.get("messages"), list):
        return [line for message in row["messages"] for line in _message(message)]
    if isinstance(row.get("prompt"), list) and isinstance(row.get("reward_model"), dict):
        return [*(line for message in row["prompt"] for line in _message(message)),
                f"[answer] {row['reward_model'].get('ground_truth')}"]  # fmt: skip
    return [f"[{key}] {value}" for key, value in row.items()]


def _message(message: dict[str, Any]) -> list[str]:
    lines = [f"[{message['role']}] {message.get('content') or ''}".rstrip()]
    for call in message.get("tool_calls") or ():
        code = (call.get("function") or call).get("arguments", {})
        lines.append("    " + str(code.get("code") if isinstance(code, dict) else code).replace("\n", "\n    "))
    return lines
