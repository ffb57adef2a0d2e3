"""The application: its commands, and what they share."""

from __future__ import annotations

from typing import Annotated

import typer

from jacpot import build_info
from jacpot.cli.compare import compare
from jacpot.cli.info import info
from jacpot.cli.tickets import tickets

__all__ = ["app"]

app = typer.Typer(
    name="jacpot",
    help="Tangent spaces and lottery tickets of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jacpot {build_info()['version']}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


app.command()(compare)
app.command()(tickets)
app.command()(info)
