"""A progress bar for solvers: how far the residual has come on its way to the tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Callback", "observing"]

Callback = Callable[[int, float, float], Any]


@contextmanager
def observing(callback: Callback | None, progress: bool, tol: float) -> Iterator[Callback | None]:
    """Give a callback that also draws a bar, when ``progress`` asks for one.

    Parameters
    ----------
    callback
        The user's, or None.
    progress
        Whether to draw.
    tol
        The relative residual that is the end of the bar.
    """
    if not progress:
        yield callback
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[iteration]} iterations, residual {task.fields[residual]:.1e}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("solving", total=1.0, iteration=0, residual=1.0)

        def observe(iteration: int, residual: float, seconds: float) -> Any:
            done = math.log(max(residual, tol)) / math.log(tol) if 0 < tol < 1 else 0.0
            bar.update(task, completed=max(0.0, done), iteration=iteration, residual=residual)
            return None if callback is None else callback(iteration, residual, seconds)

        yield observe
