"""What the commands share: options, how they are read, and how a command ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = [
    "Data",
    "Device",
    "Fresh",
    "Seeds",
    "TestSize",
    "TrainSize",
    "conclude",
    "numbers",
    "progress_bar",
    "refusals",
    "usable",
]

Number = TypeVar("Number", int, float)

Data = Annotated[
    str,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, california, or a FILE.npz with "
        "x_train, y_train, x_test, y_test or X, y (float y: regression). Named data are "
        "looked for in the folder $JACPOT_DATA, then downloaded."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Random networks to start from.")]
TrainSize = Annotated[int | None, typer.Option(min=1, help="Training examples; all if not given.")]
TestSize = Annotated[int | None, typer.Option(min=1, help="Test examples; all if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what --out holds and start anew.")]


@contextmanager
def refusals(command: str) -> Iterator[None]:
    """Say in a line what makes it impossible to begin, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        _complain(command, error)
        raise typer.Exit(2) from error


def conclude(
    command: str, console: Console, end: BaseException | None, count: str, things: str
) -> None:
    """Say what ended a study early, if anything did, and exit with 1, or 130 after Ctrl-C.

    ``count`` says how many of the ``things`` it makes are finished.
    """
    if isinstance(end, KeyboardInterrupt):
        console.print(
            f"Interrupted: {count} {things} are finished and kept. The same command continues."
        )
        raise typer.Exit(130)
    if end is not None:
        _complain(command, f"{end}; finished {things} are kept")
        raise typer.Exit(1) from end


def _complain(command: str, what: object) -> None:
    typer.secho(f"jacpot {command}: {what}", err=True, fg="red")


def numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Read numbers with commas between, or raise `ValueError` that names the option."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{name}: expected a number or several with commas between, got {text!r}"
        ) from None


def usable(name: str) -> str:
    """Give a device's name back, or raise `ValueError` with the reason why it cannot be used."""
    import torch

    try:
        float(torch.zeros(1, device=name))  # a device without memory has no value to give
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {error}") from error
    return name


def progress_bar(console: Console) -> Progress:
    """How far a study is; a task's ``name`` stands before the bar, its description behind."""
    return Progress(
        TextColumn("{task.fields[name]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.description}"),
        console=console,
        transient=True,
    )
