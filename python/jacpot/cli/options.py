"""What the commands share in reading their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["numbers", "progress_bar", "usable"]

Number = TypeVar("Number", int, float)


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
