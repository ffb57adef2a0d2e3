"""The comparison as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jacpot.studies.contenders import CONTENDERS
from jacpot.studies.record import Record

__all__ = ["headline", "notes", "report"]

Stat = dict[str, float | None]


def report(record: Record, console: Console) -> None:
    """Print what the finished seeds of a comparison say.

    Parameters
    ----------
    record
        With at least one run, and its summary.
    console
        Where to print.
    """
    result = record.result
    summary, classes = result["summary"], result["data"]["classes"]
    console.print(f"\n[bold]{headline(record)}[/]\n", highlight=False)
    error = "error" if classes else "RMSE"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("")
    for title in (f"train {error}", f"test {error}", "time", "‖Δ‖ / ‖θ0‖"):
        table.add_column(title, justify="right")
    for key, title in CONTENDERS.items():
        row = summary["contenders"][key]
        time = "same fit" if key == "one_step" else f"{row['seconds']['mean']:.1f} s"
        table.add_row(
            title,
            _error(row["train_error"], classes),
            _error(row["test_error"], classes),
            time,
            _number(row["relative_displacement"], 2),
        )
    console.print(table)

    between, distances = summary["tangent_to_network"], summary["distances"]
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    facts.add_column()
    facts.add_column(justify="right")
    facts.add_column(style="dim")
    if "agreement" in between:
        facts.add_row("same class on the test set", _error(between["agreement"], classes), "")
    spread = distances["network/network"]
    scale = "" if spread is None else f"two seeds' networks: {spread:.3f}"
    facts.add_row("distance of the functions", _number(between["distance"], 3), scale)
    facts.add_row("angle between the Δ", _number(between["angle"], 1, "°"), "unrelated Δ: 90°")
    if "kernel_change" in between:
        moved = _number(between["kernel_change"], 3)
        facts.add_row("kernel moved in training", moved, "1 − CKA; 0: not at all")
    console.print("[dim]Tangent space and trained network, from the same θ0[/]")
    console.print(facts, highlight=False)
    console.print()
    for note in notes(record):
        console.print(f"[yellow]{note}[/]", highlight=False)


def headline(record: Record) -> str:
    """Say data, sizes, network and seeds in one line."""
    data, settings = record.result["data"], record.settings
    widths = "-".join(map(str, settings["widths"]))
    seeds = f"{len(record.runs)} seed{'s' if len(record.runs) > 1 else ''}"
    return (
        f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation, "
        f"{data['test']:,} test examples · {settings['net']} {widths}, "
        f"{record.result['parameters']:,} parameters · {seeds}"
    )


def notes(record: Record) -> list[str]:
    """List what a reader should know before believing the table; nothing if all is well."""
    found = []
    strongest, weakest = max(record.settings["ridges"]), min(record.settings["ridges"])
    for seed, run in sorted(record.runs.items()):
        tangent = run["contenders"]["tangent"]["details"]
        training = run["contenders"]["network"]["details"]
        if not tangent["converged"]:
            found.append(
                f"seed {seed}: the tangent fit ended at relative residual "
                f"{tangent['relative_residual']:.1e}, not at {record.settings['tol']:g} "
                f"({tangent['status']})"
            )
        if not training["converged"]:
            found.append(
                f"seed {seed}: training ended at its limit of {training['epochs']} epochs, "
                "still improving"
            )
        if strongest > weakest and tangent["ridge"] in (strongest, weakest):
            found.append(
                f"seed {seed}: the chosen ridge, {tangent['ridge']:g}, is the last of its range; "
                "a better one may lie beyond (--ridge)"
            )
    return found


def _error(stat: Stat, classes: int | None) -> str:
    if classes is None:
        return _number(stat, 3)
    percent: Stat = {key: None if value is None else 100 * value for key, value in stat.items()}
    return _number(percent, 1, " %")


def _number(stat: Stat, digits: int, unit: str = "") -> str:
    spread: Any = stat["std"]
    plus_minus = "" if spread is None else f" ± {spread:.{digits}f}"
    return f"{stat['mean']:.{digits}f}{plus_minus}{unit}"
