"""The table and the figure of ``jacpot tickets``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from jacpot.studies.folder import write_png

__all__ = ["draw", "summarise", "table"]

NUMBERS = (
    "accuracy",
    "early_stop",
    "early_stop_accuracy",
    "train_loss",
    "effective_density",
    "emptied",
)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of each number, by kind and falling density."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], round(row["density"], 4)), []).append(row)
    summary = []
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    order = sorted(groups.items(), key=lambda item: (kinds.index(item[0][0]), -item[0][1]))
    for (kind, _), members in order:
        line: dict[str, Any] = {"kind": kind, "density": mean(m["density"] for m in members)}
        line["seeds"] = len(members)
        for name in NUMBERS:
            values = [float(m[name]) for m in members if name in m]
            if values:
                line[name] = mean(values)
                line[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        summary.append(line)
    return summary


def table(summary: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line a kind and density, to print with rich."""
    shown = [name for name in NUMBERS if any(name in line for line in summary)]
    result = Table("kind", "density", *(name.replace("_", " ") for name in shown), title=title)
    last = None
    for line in summary:
        if last not in (None, line["kind"]):
            result.add_section()
        last = line["kind"]
        cells = [_cell(name, line) for name in shown]
        result.add_row(line["kind"], f"{line['density']:.2%}", *cells)
    return result


def _cell(name: str, line: Mapping[str, Any]) -> str:
    if name not in line:
        return ""
    percent = "accuracy" in name or "density" in name
    scale = 100 if percent else 1
    digits = 2 if percent else 4 if name == "train_loss" else 0
    text = f"{line[name] * scale:.{digits}f}"
    spread = line.get(f"{name}_std")
    return text if spread is None else f"{text} ± {spread * scale:.{digits}f}"


def draw(summary: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Accuracy and early-stop step against density, one line a kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in dict.fromkeys(line["kind"] for line in summary):
        # A ticket without weights has no place on the axis.
        lines = [line for line in summary if line["kind"] == kind and line["density"] > 0]
        x = [100 * line["density"] for line in lines]
        spread = [100 * (line.get("accuracy_std") or 0) for line in lines]
        y = [100 * line["accuracy"] for line in lines]
        left.errorbar(x, y, spread, marker="o", markersize=3, label=kind)
        right.plot(x, [line["early_stop"] for line in lines], marker="o", markersize=3)
    left.set(xscale="log", xlabel="density, %", ylabel="test accuracy, %")
    right.set(xscale="log", xlabel="density, %", ylabel="step of the lowest validation loss")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title)
    write_png(path, figure)
    return path
