"""``retool sandbox …``: the code interpreter by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

import click

from retool.cli.common import EXIT_NOT_IN_ORDER, QUIET, show_help
from retool.errors import UserError


@click.group(invoke_without_command=True)
@click.pass_context
def sandbox(ctx: click.Context) -> None:
    """The code interpreter by itself."""
    show_help(ctx)


@sandbox.command(name="run")
@click.argument("file", metavar="FILE|-")
@click.option("--timeout", type=float, metavar="S", help="Seconds the program may take (sandbox.timeout_s).")
@click.option("--memory-mb", type=int, metavar="N", help="Memory the program may take (sandbox.memory_mb).")
@click.option("--json", "as_json", is_flag=True, help="Print the typed result on one line.")
def sandbox_run(file: str, timeout: float | None, memory_mb: int | None, as_json: bool) -> int:
    """Run one Python program as a model's code is run; exit code 0 where it ended well, else 1."""
    import asyncio
    import json
    from dataclasses import asdict

    from retool.config import make_recipe
    from retool.sandbox import LocalSandbox
    from retool.types import ExecutionResult, ExecutionStatus

    code = _read_program(file)
    # One run is not worth the second that a preload list of large libraries takes.
    limits = {"workers": 1, "timeout_s": timeout, "memory_mb": memory_mb, "preload": ["math"]}
    config = make_recipe({"sandbox": {key: value for key, value in limits.items() if value is not None}}).sandbox

    async def execute() -> ExecutionResult:
        async with LocalSandbox(config) as box:
            return await box.execute(code, config.timeout_s)

    result = asyncio.run(execute())
    ended_well = result.status is ExecutionStatus.OK
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        _write_whole(sys.stdout, result.stdout)
        _write_whole(sys.stderr, result.stderr)
        if not ended_well:
            code_text = "" if result.exit_code is None else f", exit code {result.exit_code}"
            click.echo(f"retool: the program ended with {result.status}{code_text}", err=True)
    return 0 if ended_well else EXIT_NOT_IN_ORDER


@sandbox.command(name="serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option("--token", envvar="RETOOL_SANDBOX_TOKEN", default="", help="Asked of clients (or RETOOL_SANDBOX_TOKEN).")
@click.option("--workers", type=int, metavar="N", help="Programs that run at a time (sandbox.workers).")
@click.option("--timeout", "timeout_s", type=float, metavar="S", default=300.0, help="Seconds a program may ask for.")
@click.option("--memory-mb", type=int, metavar="N", help="Memory a program may ask for (sandbox.memory_mb).")
@click.option("--output-kb", type=int, metavar="N", help="KiB of stdout, and of stderr (sandbox.output_kb).")
@click.option("--file-mb", type=int, metavar="N", help="Each program's disk (sandbox.file_mb).")
@click.option("--tier", metavar="TIER", help="The least isolation to accept (sandbox.tier).")
@click.option("--max-queue", type=click.IntRange(0), default=2048, show_default=True, help="Programs that may wait.")
@click.option("--preload", metavar="A,B,…", help="Modules to import once (sandbox.preload).")
@click.option(
    "--drain", type=click.IntRange(0), metavar="S", default=30, show_default=True, help="Seconds to finish in."
)
@click.option("--access-log", is_flag=True, help="Print a line for each request.")
@QUIET
def sandbox_serve(
    host: str, port: int, token: str, max_queue: int, drain: int, access_log: bool, quiet: bool, **limits: Any
) -> int:
    """Run programs for others over HTTP, as SandboxFusion does, until SIGTERM or Ctrl-C."""
    import uvloop

    from retool.config import make_recipe
    from retool.sandbox import LocalSandbox
    from retool.sandbox.serve import serve
    from retool.sandbox.server import ServerConfig

    if limits["preload"] is not None:
        limits["preload"] = [name for name in limits["preload"].split(",") if name]
    given = {key: value for key, value in limits.items() if value is not None}
    config = make_recipe({"sandbox": given | {"token": token}}).sandbox
    service = ServerConfig(config, host, port, token, max_queue, drain_s=drain, access_log=access_log)
    uvloop.run(serve(LocalSandbox(config), service, announce=lambda line: None if quiet else click.echo(line)))
    return 0


@sandbox.command(name="bench")
@click.option(
    "--workload", type=click.Choice(["print", "sympy", "mixed"]), default="print", show_default=True, help="Programs."
)
@click.option(
    "--concurrency", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Requests at a time."
)
@click.option("--requests", type=click.IntRange(1), default=1000, show_default=True, metavar="N", help="In all.")
@click.option("--http", is_flag=True, help="Through a service in a process of its own, instead of embedded.")
@click.option("--workers", type=int, metavar="N", help="Programs that run at a time (sandbox.workers).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures on one line.")
def sandbox_bench(
    workload: str, concurrency: int, requests: int, http: bool, workers: int | None, as_json: bool
) -> int:
    """Measure how many programs a second the sandbox runs here, and how long one waits for its answer.

    Exit code 1 where an answer was wrong.
    """
    import json
    from dataclasses import asdict

    import uvloop

    from retool.config import make_recipe
    from retool.sandbox.bench import bench

    config = make_recipe({"sandbox": {} if workers is None else {"workers": workers}}).sandbox
    found = uvloop.run(bench(config, workload, concurrency, requests, http))
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        how = "over HTTP" if http else "embedded"
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(found.statuses.items()))
        click.echo(f"{workload}, {requests} requests, {concurrency} at a time, {how}, tier {found.tier}")
        latency = f"p50 {found.p50_ms:.1f} ms, p99 {found.p99_ms:.1f} ms"
        click.echo(f"{found.requests_per_second:.0f} a second; {latency}; {statuses}")
        if found.wrong:
            click.echo(f"retool: {found.wrong} answers were not what the program must give", err=True)
    return EXIT_NOT_IN_ORDER if found.wrong else 0


def _read_program(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"FILE = {file!r}: {error.strerror or error}; give the path of a Python program, or -"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"FILE = {file!r}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def _write_whole(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
