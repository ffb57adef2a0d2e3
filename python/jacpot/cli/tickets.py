"""``jacpot tickets``: search tickets by one method, train them, and say how they do."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jacpot.cli import options

if TYPE_CHECKING:
    from jacpot.studies.split import Split
    from jacpot.studies.ticket_store import Store
    from jacpot.studies.tickets import TicketSettings

__all__ = ["tickets"]


class Method(str, Enum):
    """Ways to find a ticket."""

    imp = "imp"
    magnitude = "magnitude"
    random = "random"
    snip = "snip"
    grasp = "grasp"
    synflow = "synflow"
    fisher = "fisher"
    ntk = "ntk"
    ntk_alignment = "ntk-alignment"
    edge_popup = "edge-popup"
    zhou = "zhou"
    biprop = "biprop"


PRUNING = ("density", "scope", "iterations", "score_size")
SUPERMASK = ("density", "weights")
# What else than the options of all is an option of a method; of pruning if it is not named.
OPTIONS = {
    Method.imp: ("rounds", "prune_fraction", "rewind"),
    Method.edge_popup: SUPERMASK,
    Method.zhou: SUPERMASK,
    Method.biprop: SUPERMASK,
}


class Net(str, Enum):
    """Families of networks."""

    mlp = "mlp"
    cnn = "cnn"
    vgg = "vgg"


class Scope(str, Enum):
    """How kept weights are spread over the layers."""

    everywhere = "global"
    layer = "layer"
    erk = "erk"
    balanced = "balanced"


class Weights(str, Enum):
    """Frozen weights of supermasks."""

    initial = "initial"
    signed_constant = "signed-constant"


def tickets(
    context: typer.Context,
    method: Annotated[Method, typer.Argument(help="How tickets are found.")],
    data: options.Data = "digits",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; run again to continue. runs/tickets-METHOD."),
    ] = None,
    seeds: options.Seeds = 1,
    net: Annotated[Net, typer.Option(help="Family of networks.")] = Net.mlp,
    width: Annotated[
        str, typer.Option(help="Width, or one a hidden layer (a pair of layers of a vgg).")
    ] = "300,100",
    depth: Annotated[
        int | None, typer.Option(min=1, help="Hidden layers, all of one width.")
    ] = None,
    he: Annotated[bool, typer.Option("--he", help="Draw the weights by He's rule.")] = False,
    train_size: options.TrainSize = None,
    test_size: options.TestSize = None,
    density: Annotated[
        str, typer.Option(help="Shares of weights to keep: 0.1,0.01. Not for imp.")
    ] = "0.1",
    scope: Annotated[
        Scope, typer.Option(help="How they are spread over the layers. Pruning only.")
    ] = Scope.everywhere,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of scoring; synflow 100, others 1 if not given."),
    ] = None,
    score_size: Annotated[
        int, typer.Option(min=1, help="Training examples that scores look at.")
    ] = 512,
    weights: Annotated[
        Weights, typer.Option(help="Frozen weights of a supermask.")
    ] = Weights.initial,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of pruning. imp only.")] = 15,
    prune_fraction: Annotated[
        float, typer.Option(help="Share of the kept weights pruned a round. imp only.")
    ] = 0.2,
    rewind: Annotated[str, typer.Option(help="init, learning-rate, or a step. imp only.")] = "init",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of a training.")] = 5000,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of Adam; 0.0012, of supermasks 0.1 (zhou) and 0.01, if not given."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 60,
    device: options.Device = "cpu",
    fresh: options.Fresh = False,
) -> None:
    """Search tickets by one method, train what was found, and report it by density.

    imp trains controls beside each ticket: its mask on new weights, and a random mask of the same
    layer densities. Every training is kept as soon as it is done; the same command continues after
    an interruption. A table, figure.png and tickets.json in --out.
    """
    from jacpot.studies.data import load
    from jacpot.studies.record import environment
    from jacpot.studies.split import split
    from jacpot.studies.steps import Steps
    from jacpot.studies.ticket_store import Store
    from jacpot.studies.tickets import SUPERMASKS, TicketSettings, build
    from jacpot.studies.tickets_report import draw, summarise, table

    name = method.value
    folder = out or Path(f"runs/tickets-{name}")
    if learning_rate is None:
        masks = 0.1 if name == "zhou" else 0.01
        learning_rate = masks if name in SUPERMASKS else 1.2e-3
    with options.refusals("tickets"):
        _refuse_idle_options(context, method)
        widths = options.numbers("width", width, int)
        if depth is not None:
            if len(widths) != 1:
                raise ValueError(f"depth: needs a single --width, got {width}")
            widths *= depth
        settings = TicketSettings(
            method=name,
            net=net.value,
            widths=widths,
            he=he,
            densities=options.numbers("density", density, float),
            scope=scope.value,
            iterations=iterations or (100 if name == "synflow" else 1),
            score_size=score_size,
            weights=weights.value.replace("-", "_"),
            rounds=rounds,
            prune_fraction=prune_fraction,
            rewind=int(rewind) if rewind.isdecimal() else rewind,
            recipe=Steps(steps=steps, learning_rate=learning_rate, batch_size=batch_size),
        )
        dataset = load(data)
        parts = split(dataset, train_size, test_size, device=options.usable(device))
        build(settings, parts, seed=0)  # what cannot be built is said before anything is kept
        store = Store(folder, settings.record(dataset, parts), fresh)

    console = Console(log_path=False)
    rows, end = _run(store, settings, parts, seeds, console)
    if rows:
        summary = summarise(rows)
        title = f"{name} on {dataset.name}, {net.value} {width}" + (f" x {depth}" if depth else "")
        console.print(table(summary, title))
        described = {**store.settings, "rounds": rounds}
        result = {"settings": described, "environment": environment(), "summary": summary}
        try:
            path = store.write("tickets.json", {**result, "rows": rows})
            figure = draw(summary, folder / "figure.png", title)
            console.print(f"[dim]{path}\n{figure}[/]", highlight=False, soft_wrap=True)
        except OSError as error:
            end = end or error
    options.conclude(
        "tickets", console, end, f"{len(rows)} of {seeds * settings.trainings}", "trainings"
    )


def _run(
    store: Store, settings: TicketSettings, parts: Split, seeds: int, console: Console
) -> tuple[list[dict[str, Any]], BaseException | None]:
    """Run the study behind a progress bar; give the rows, and what ended it early."""
    from jacpot.studies.tickets import run

    rows: list[dict[str, Any]] = []
    with options.progress_bar(console) as bar:
        task = bar.add_task("", total=seeds * settings.trainings, name="trainings")

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            bar.advance(task)
            found = f"{row['kind']} at {row['density']:.2%}: {row['accuracy']:.2%}"
            console.log(f"seed {row['seed']}, {found}", highlight=False)

        try:
            for seed in range(seeds):
                run(store, settings, parts, seed, keep)
        except (KeyboardInterrupt, OSError, RuntimeError, ValueError) as end:
            return rows, end
    return rows, None


def _refuse_idle_options(context: typer.Context, method: Method) -> None:
    """Refuse options that the method does not look at."""
    used = OPTIONS.get(method, PRUNING)
    for name in sorted({*PRUNING, *SUPERMASK, *OPTIONS[Method.imp]} - {*used}):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{name}: has no meaning for {method.value}")
