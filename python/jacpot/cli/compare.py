"""``jacpot compare``: the tangent space of a random network against the network that is trained."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jacpot.cli import options

if TYPE_CHECKING:
    from jacpot.studies.compare import Settings
    from jacpot.studies.record import Record
    from jacpot.studies.split import Split

__all__ = ["compare"]


class Net(str, Enum):
    """Families of networks."""

    mlp = "mlp"
    cnn = "cnn"


class Optimizer(str, Enum):
    """Optimizers of the trained network."""

    adam = "adam"
    sgd = "sgd"


# Hidden widths when none are given.
WIDTHS = {Net.mlp: 256, Net.cnn: 32}


def compare(
    data: options.Data = "digits",
    out: Annotated[
        Path, typer.Option(help="Folder for the results; run again to continue.")
    ] = Path("runs/compare"),
    seeds: options.Seeds = 3,
    net: Annotated[Net, typer.Option(help="Family of networks.")] = Net.mlp,
    width: Annotated[
        str | None,
        typer.Option(help="Width (channels of a cnn), or one a hidden layer: 300,100."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Hidden layers, all of one width; 2 if not given.")
    ] = None,
    train_size: options.TrainSize = None,
    test_size: options.TestSize = None,
    ridge: Annotated[
        str | None,
        typer.Option(
            help="Ridge in units of the kernel's mean diagonal; of several, 0.1,0.01, the best "
            "on the validation set; 0 asks for the minimum norm. 1 down to 0.0001 if not given."
        ),
    ] = None,
    tol: Annotated[
        float, typer.Option(help="Relative residual at which the tangent fit is solved.")
    ] = 1e-4,
    optimizer: Annotated[Optimizer, typer.Option(help="Trains the network.")] = Optimizer.adam,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its first step size; adam 0.001, sgd 0.01 if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a training step.")] = 64,
    max_epochs: Annotated[
        int, typer.Option(min=1, help="Training ends there, converged or not.")
    ] = 300,
    device: options.Device = "cpu",
    fresh: options.Fresh = False,
) -> None:
    """Fit the tangent space of a random network in closed form; compare with training it.

    Four ways from the same random network, each with its test error, and how far the tangent-space
    solution is from the trained network: a table, a figure and result.json in --out. Ctrl-C
    keeps the seeds that are finished; the same command continues.
    """
    from jacpot.studies.compare import Settings, describe, settings_record
    from jacpot.studies.contenders import RIDGES
    from jacpot.studies.data import load
    from jacpot.studies.record import Record
    from jacpot.studies.split import split
    from jacpot.studies.training import Recipe

    if learning_rate is None:
        learning_rate = {Optimizer.adam: 1e-3, Optimizer.sgd: 1e-2}[optimizer]
    with options.refusals("compare"):
        settings = Settings(
            net=net.value,
            widths=_widths(net, width, depth),
            ridges=RIDGES if ridge is None else options.numbers("ridge", ridge, float),
            train_size=train_size,
            test_size=test_size,
            tol=tol,
            recipe=Recipe(optimizer.value, learning_rate, batch_size, max_epochs=max_epochs),
            device=options.usable(device),
        )
        dataset = load(data)
        parts = split(dataset, train_size, test_size, device=settings.device)
        facts = describe(settings, dataset, parts)
        record = Record(out, "compare", settings_record(settings, dataset), facts, fresh)

    console = Console()
    end = _run(record, settings, parts, seeds, console)
    if record.result.get("summary"):
        from jacpot.studies.compare_figure import draw
        from jacpot.studies.compare_table import report

        report(record, console)
        try:
            figure = draw(record, parts, record.folder / "figure.png")
            console.print(f"[dim]{record.path}\n{figure}[/]", highlight=False, soft_wrap=True)
        except OSError as error:
            end = end or error
    options.conclude("compare", console, end, f"{len(record.runs)} of {seeds}", "seeds")


def _run(
    record: Record, settings: Settings, parts: Split, seeds: int, console: Console
) -> BaseException | None:
    """Run the study behind a progress bar; give what ended it early."""
    from jacpot.studies.compare import run

    def done() -> int:
        return sum(seed in record.runs for seed in range(seeds))

    if done():
        console.print(
            f"[dim]{record.folder} already holds {done()} of {seeds} seeds[/]", soft_wrap=True
        )
    with options.progress_bar(console) as bar:
        task = bar.add_task("", total=seeds, completed=done(), name="seeds")

        def show(seed: int, stage: str) -> None:
            bar.update(task, completed=done(), name=f"seed {seed}", description=stage)

        try:
            run(record, settings, parts, range(seeds), show)
        except (KeyboardInterrupt, OSError, RuntimeError, ValueError) as end:
            return end
    return None


def _widths(net: Net, width: str | None, depth: int | None) -> tuple[int, ...]:
    widths = options.numbers("width", width, int) if width is not None else (WIDTHS[net],)
    if len(widths) == 1:
        return widths * (2 if depth is None else depth)
    if depth is not None and depth != len(widths):
        raise ValueError(f"depth: {depth} contradicts the {len(widths)} widths {width}")
    return widths
