"""The application: its commands, and what they share."""

from __future__ import annotations

import typer

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
app.command()(compare)
app.command()(tickets)
app.command()(info)
