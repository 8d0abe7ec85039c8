"""The command: parse, dispatch lazily, turn a user's mistake into one line.

Nothing but click is imported before a command is known, so that ``retool --help`` answers at once.

Exit codes: 0 done; 1 the thing asked about is not in order (a program in the sandbox failed, the doctor found something
broken, the machine failed, a run ended itself); 2 a mistake of the user; 130 Ctrl-C; 143 SIGTERM. With
RETOOL_TRACEBACK=1 errors keep their traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retool.cli.cold_start import cold_start
from retool.cli.common import EXIT_CTRL_C, EXIT_NOT_IN_ORDER, EXIT_SIGTERM, EXIT_USER_ERROR, QUIET, show_help
from retool.cli.data import data
from retool.cli.sandbox import sandbox
from retool.errors import HealthError, InfraError, UserError

if TYPE_CHECKING:
    from retool.config import Recipe


Job = Callable[..., Any]
"""``run(recipe, *, progress, …) -> dict`` of one of the jobs."""


def load_job(name: str) -> Job:
    """The ``run`` of ``retool.<name>``, imported now."""
    job: Job = importlib.import_module(f"retool.{name}").run
    return job


DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What the disk does, not the user and not this program."""


class _InterruptedError(Exception):
    """Ctrl-C or SIGTERM, in a form that click does not answer by itself."""


class _Root(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a newcomer's way, not of the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _InterruptedError from None


@click.group(cls=_Root, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="retool")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Teach a language model when to run code."""
    show_help(ctx)


OVERRIDES = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")


def _toml_string(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


def _load(path: Path, overrides: Sequence[str], options: dict[str, str | int | None]) -> Recipe:
    """The recipe with the overrides, then with those options that were given."""
    from retool.config import load_recipe

    given = [
        f"{key}={_toml_string(value) if isinstance(value, str) else value}"
        for key, value in options.items()
        if value is not None
    ]
    return load_recipe(path, [*overrides, *given])


@cli.command()
@OVERRIDES
@click.option(
    "--from-scratch", is_flag=True, help="Pre-train the tiny base model too, instead of using the shipped one."
)
@click.option("--with-control", is_flag=True, help="Also train without the tool, on the same tasks, to compare.")
@click.option("--seed", type=int, help="The seed of everything random (run.seed).")
@click.option("--out", metavar="DIR", help="The folder in which the run folder is made (run.out).")
@QUIET
@click.pass_obj
def quickstart(
    load: Callable[[str], Job],
    overrides: tuple[str, ...],
    from_scratch: bool,
    with_control: bool,
    seed: int | None,
    out: str | None,
    quiet: bool,
) -> None:
    """The whole job on this machine, in minutes."""
    from retool.config import SHIPPED_RECIPES
    from retool.progress import Progress

    recipe = _load(SHIPPED_RECIPES / "quickstart.toml", overrides, {"run.seed": seed, "run.out": out})
    run = load("quickstart")
    run(recipe, from_scratch=from_scratch, with_control=with_control, progress=Progress(quiet=quiet))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def doctor(as_json: bool) -> int:
    """What this machine can do, and what is missing."""
    import json

    from retool.doctor import examine, render

    found = examine()
    click.echo(json.dumps(found, indent=2) if as_json else render(found))
    return 0 if found["ok"] else EXIT_NOT_IN_ORDER


@dataclass(frozen=True)
class _JobOptions:
    """What sft, rl and eval have in common on the command line."""

    recipe: str
    overrides: tuple[str, ...]
    engine: str
    verl: tuple[str, ...]
    quiet: bool
    dry_run: bool


def _job_command(function: Callable[..., None]) -> Callable[..., None]:
    decorators: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.argument("recipe"),
        OVERRIDES,
        click.option(
            "--engine",
            type=click.Choice(["local", "verl"]),
            default="local",
            show_default=True,
            help="local: this machine, one device. verl: many GPUs and nodes, on Ray (docs/cluster.md).",
        ),
        click.option(
            "--verl", multiple=True, metavar="KEY=VALUE", help="An option of verl that the recipe has no field for."
        ),
        QUIET,
        click.option("--dry-run", is_flag=True, help="Print the resolved recipe and what would run; start nothing."),
        click.pass_obj,
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def _run_job(load: Callable[[str], Job], name: str, options: _JobOptions, model: str | None = None) -> None:
    from retool.config import recipe_path

    recipe = _load(recipe_path(options.recipe), options.overrides, {"model.path": model})
    if options.verl and options.engine != "verl":
        raise UserError(f"--verl {options.verl[0]}: that is for --engine verl; leave it out, or add it")
    if options.dry_run:
        click.echo(_plan(name, recipe, options), nl=False)
        return
    from retool.progress import Progress

    progress = Progress(quiet=options.quiet)
    if options.engine == "local":
        load(name)(recipe, progress=progress)
        return
    summary = load("cluster.launch")(recipe, job=name, extra=options.verl, progress=progress)
    if name == "evaluate" and summary:
        show: Callable[..., None] = importlib.import_module("retool.evaluate").show
        show(summary["eval"], progress)


def _plan(name: str, recipe: Recipe, options: _JobOptions) -> str:
    """A recipe file again, with the plan as comments."""
    from retool.config import recipe_toml
    from retool.plan import make_plan, render

    lines = render(make_plan(name, recipe), memory=options.engine == "local").splitlines()
    if options.engine == "verl":
        describe: Callable[..., list[str]] = importlib.import_module("retool.cluster.options").describe
        lines += ["", *describe(name, recipe, options.verl)]
    return recipe_toml(recipe) + "\n" + "".join(f"# {line}".rstrip() + "\n" for line in lines)


@cli.command()
@_job_command
def sft(load: Callable[[str], Job], **options: Any) -> None:
    """Fine-tune on demonstrations (cold start).

    RECIPE is a TOML file, or the name of a shipped one.
    """
    _run_job(load, "sft", _JobOptions(**options))


@cli.command()
@_job_command
def rl(load: Callable[[str], Job], **options: Any) -> None:
    """Reinforcement learning with code execution.

    RECIPE is a TOML file, or the name of a shipped one.
    """
    _run_job(load, "rl", _JobOptions(**options))


@cli.command(name="eval")
@_job_command
@click.option("--model", metavar="PATH", help="The checkpoint to evaluate (model.path).")
def evaluate(load: Callable[[str], Job], model: str | None, **options: Any) -> None:
    """Evaluate a model.

    RECIPE is a TOML file, or the name of a shipped one.
    """
    _run_job(load, "evaluate", _JobOptions(**options), model)


cli.add_command(data)
cli.add_command(cold_start)
cli.add_command(sandbox)


@cli.command()
@click.argument("run", metavar="RUN")
def report(run: str) -> None:
    """Write the report.html of a run folder again."""
    if not Path(run).is_dir():
        raise UserError(f"RUN = {run!r}: there is no such folder; give a run folder, e.g. runs/quickstart")
    write_report: Callable[[Path], Path] = importlib.import_module("retool.report").write_report
    click.echo(str(write_report(Path(run))))


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[list[int]]:
    """While this is open SIGTERM does what Ctrl-C does just then: asyncio's handler where a loop runs, which cancels
    its task, KeyboardInterrupt elsewhere; so a job needs one way to clean up. Yields the signals that came."""
    came: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        came.append(signum)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    interrupt = signal.getsignal(signal.SIGINT)
    ignored = interrupt is signal.SIG_IGN
    if ignored:
        # A script's shell starts background jobs so. asyncio takes Ctrl-C into its hands only where Python's own
        # handler stands; blocked, the signal still does nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, terminate)
        if ignored:
            signal.signal(signal.SIGINT, interrupt)  # before the next line, so that a pending one is dropped
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _complain(message: str) -> None:
    print(f"retool: error: {' '.join(message.split())}", file=sys.stderr)


def _run_command(arguments: Sequence[str] | None, load: Callable[[str], Job]) -> int:
    """Run one command and answer its exit code; errors come out as they were raised."""
    argument_list = None if arguments is None else list(arguments)
    code = cli.main(argument_list, prog_name="retool", standalone_mode=False, obj=load)
    return code if isinstance(code, int) else 0


def main(arguments: Sequence[str] | None = None, *, load: Callable[[str], Job] = load_job) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's own.
        load: from a job's name (quickstart, sft, rl, evaluate) to the function that runs it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a tick or a model's stray byte must not end a job on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")
    # While torch's threads wait for each other they spin, beside other work on the very core that the other one needs.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported
    with _sigterm_is_ctrl_c() as terminated:
        try:
            return _run_command(arguments, load)
        except OSError as error:
            if error.errno not in DISK_FAULTS or os.environ.get("RETOOL_TRACEBACK") == "1":
                raise
            _complain(f"{error.filename or 'a file'} could not be written ({error.strerror}); mend this and try again")
            return EXIT_NOT_IN_ORDER
        except _InterruptedError:
            print("retool: terminated" if terminated else "retool: interrupted", file=sys.stderr)
            return EXIT_SIGTERM if terminated else EXIT_CTRL_C
        except (click.ClickException, UserError, InfraError, HealthError) as error:
            if os.environ.get("RETOOL_TRACEBACK") == "1":
                raise
            if isinstance(error, click.UsageError):
                command = error.ctx.command_path if error.ctx is not None else "retool"
                _complain(f"{error.format_message()} See '{command} --help'.")
            else:
                _complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
            return EXIT_NOT_IN_ORDER if isinstance(error, InfraError | HealthError) else EXIT_USER_ERROR
