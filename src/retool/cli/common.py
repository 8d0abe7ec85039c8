"""What the commands share."""

from __future__ import annotations

import signal

import click

EXIT_NOT_IN_ORDER = 1
EXIT_USER_ERROR = 2
EXIT_CTRL_C = 128 + signal.SIGINT
EXIT_SIGTERM = 128 + signal.SIGTERM

QUIET = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")


def show_help(ctx: click.Context) -> None:
    """A group that is called without a command says what there is."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
