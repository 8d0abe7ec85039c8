"""``retool cold-start``: trajectories with code from a teacher, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from retool.cli.common import EXIT_NOT_IN_ORDER, QUIET
from retool.cli.data import OUT, cleaning_options, parse_columns


@click.command(name="cold-start")
@click.argument("name", metavar="SET")
@OUT
@click.option("--teacher", "url", required=True, metavar="URL", help="An OpenAI-compatible endpoint, e.g. http://…/v1.")
@click.option("--model", required=True, help="The teacher's name there.")
@click.option("--key-env", default="OPENAI_API_KEY", show_default=True, help="The variable that holds the key, if any.")
@cleaning_options
@click.option("--limit", type=click.IntRange(0), default=0, help="Problems at most; 0: all.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Answers a problem.")
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True, help="Requests at a time.")
@click.option("--max-requests", type=click.IntRange(0), default=0, help="Budget, retries included; 0: no limit.")
@click.option("--max-total-tokens", type=click.IntRange(0), default=0, help="Budget, prompts and answers; 0: no limit.")
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of one answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds of one request.",
)
@click.option("--retries", type=click.IntRange(0), default=4, show_default=True, help="After a failure that may pass.")
@click.option("--timeout-code", type=float, default=30.0, show_default=True, help="Seconds of one program.")
@click.option("--sandbox-url", default="", help="Run the programs in this service (sandbox.url).")
@click.option("--keep-textual", is_flag=True, help="Keep answers without a program.")
@click.option(
    "--form",
    type=click.Choice(["messages", "tags"]),
    default="messages",
    show_default=True,
    help="With tool calls, or as one string with tags.",
)
@click.option("--stateful", is_flag=True, help="Run an answer's programs in one interpreter (sandbox.stateful).")
@click.option("--restart", is_flag=True, help="Set the answers that are there aside and ask anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@QUIET
def cold_start(
    name: str, out: Path, url: str, model: str, key_env: str, as_json: bool, quiet: bool, **options: Any
) -> int:
    """Ask a teacher for solutions with code in them, check them, write them as conversations.

    SET is a name from 'retool data list', a file, or a hub name. The same command typed again goes on: no answer
    that is in OUT.journal.jsonl is asked for again.
    """
    import json

    from retool.data.cold_start.generate import Job, generate
    from retool.data.prepare import beside
    from retool.progress import Progress

    progress = Progress(quiet=quiet or as_json)
    job: Job = _job(name, out, url, model, key_env, options)
    report = generate(job, progress)
    code = EXIT_NOT_IN_ORDER if report.given_up else 0
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return code
    progress.table(f"{name} → {out}", ["", "count"], report.table())
    for reason, said in report.said.items():
        progress.line(f"{reason}: the teacher said, for one: {said}")
    if report.given_up:
        progress.line(f"The teacher gives no answers ({report.given_up}): the same command goes on when it does.")
    elif report.budget_spent:
        progress.line("The budget is spent: the same command with a larger one goes on.")
    elif report.failed or report.undecided:
        progress.line("The same command asks again for what failed.")
    written = str(out) if report.kept else "Nothing is kept, so no Parquet file is written."
    progress.line(f"{written}  (to read: {beside(out, 'samples.md')}, the counts: {beside(out, 'report.json')})")
    return code


def _job(name: str, out: Path, url: str, model: str, key_env: str, options: dict[str, Any]) -> Any:
    import os

    from retool.config import make_recipe
    from retool.data.cold_start.generate import Job
    from retool.data.cold_start.teacher import TeacherConfig
    from retool.data.prepare import Cleaning

    limits = {"timeout_s": options["timeout_code"], "url": options["sandbox_url"], "stateful": options["stateful"]}
    if limits["url"]:
        limits["token"] = os.environ.get("RETOOL_SANDBOX_TOKEN", "")
    sandbox = make_recipe({"sandbox": limits}).sandbox
    teacher = TeacherConfig(
        url, model, os.environ.get(key_env, "").strip(),
        options["temperature"], options["max_tokens"], options["timeout"], options["retries"],
    )  # fmt: skip
    cleaning = Cleaning(against=options["against"], ngram=options["ngram"], share=options["min_share"])
    return Job(
        name, out, teacher, file=options["file"], columns=parse_columns(options["columns"]), split=options["split"],
        limit=options["limit"], samples=options["samples"], concurrency=options["concurrency"],
        max_requests=options["max_requests"], max_total_tokens=options["max_total_tokens"], cleaning=cleaning,
        textual=options["keep_textual"], form=options["form"], sandbox=sandbox, restart=options["restart"],
    )  # fmt: skip
