"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from jacpot.studies.compare_table import headline
from jacpot.studies.contenders import CONTENDERS
from jacpot.studies.folder import write_png
from jacpot.studies.record import Record
from jacpot.studies.split import Split

__all__ = ["draw"]

COLOURS = {
    "tangent": "#c4472b",
    "network": "#1f4e79",
    "last_layer": "#8a8f98",
    "one_step": "#c9a227",
}
INK, FAINT, RULE = "#22262b", "#767c85", "#d9dce0"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 8.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
SHEET = LinearSegmentedColormap.from_list("sheet", ["#f7f4ee", "#e8c9ae", "#c4472b", "#6d1f14"])
PICTURES = 7


def draw(record: Record, parts: Split, path: Path) -> Path:
    """Draw what the finished seeds of a comparison say.

    Parameters
    ----------
    record
        With at least one run, and its summary.
    parts
        The data as they were used.
    path
        The PNG file to write.

    Returns
    -------
    Path
        ``path``.
    """
    outputs = {seed: record.arrays(seed) for seed in sorted(record.runs)}
    first = outputs[min(outputs)]
    disagreeing = _disagreeing(first, parts)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8.5 if len(disagreeing) else 7.2))
        grid = GridSpec(
            2, 2, figure, left=0.14, right=0.965, top=0.865,
            bottom=0.27 if len(disagreeing) else 0.09, hspace=0.48, wspace=0.36,
        )  # fmt: skip
        figure.text(0.03, 0.955, "Tangent space and trained network", size=16, weight="bold")
        figure.text(0.03, 0.93, headline(record), size=9, color=FAINT)
        _errors(figure.add_subplot(grid[0, 0]), record)
        _learning(figure.add_subplot(grid[0, 1]), record)
        _functions(figure.add_subplot(grid[1, 0]), first, parts, record)
        _distances(figure.add_subplot(grid[1, 1]), record)
        if len(disagreeing):
            _pictures(figure, disagreeing, first, parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, figure, facecolor="white", metadata={"Software": "jacpot"})
    return path


def _errors(axes: Axes, record: Record) -> None:
    """Test error of each contender, every seed a dot, on a logarithmic scale."""
    classes = record.result["data"]["classes"]
    scale, unit = (100, " %") if classes else (1, "")
    summary = record.result["summary"]["contenders"]
    # A seed without a single wrong example has no place on a logarithmic scale but the edge.
    least = 50 / record.result["data"]["test"] if classes else 0.0
    lowest, highest = np.inf, 0.0
    for row, key in enumerate(CONTENDERS):
        values = [
            max(least, scale * run["contenders"][key]["test_error"]) for run in record.runs.values()
        ]
        mean = scale * summary[key]["test_error"]["mean"]
        train = scale * summary[key]["train_error"]["mean"]
        lowest, highest = min(lowest, *values), max(highest, *values)
        axes.scatter(values, [row] * len(values), s=26, color=COLOURS[key], alpha=0.35, lw=0)
        axes.scatter([max(least, mean)], [row], s=95, marker="|", color=COLOURS[key], lw=2.6)
        digits = 1 if classes else 3
        axes.annotate(
            f"{mean:.{digits}f}{unit}", (1.02, row - 0.1), xycoords=("axes fraction", "data"),
            size=10, weight="bold", va="center", color=COLOURS[key],
        )  # fmt: skip
        axes.annotate(
            f"train {train:.{digits}f}{unit}", (1.02, row + 0.24),
            xycoords=("axes fraction", "data"), size=7.5, va="center", color=FAINT,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(lowest / 1.5, highest * 1.5)
    axes.set_yticks(range(len(CONTENDERS)), list(CONTENDERS.values()), color=INK, size=9.5)
    axes.set_ylim(len(CONTENDERS) - 0.4, -0.6)
    _few_ticks(axes.xaxis, highest / lowest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
    axes.spines["left"].set_visible(False)
    axes.set_title("Test error" if classes else "Test error (RMSE)")
    axes.set_xlabel("each dot a seed, the bar their mean; logarithmic")


def _few_ticks(axis: Axis, ratio: float) -> None:
    """Place the ticks of a logarithmic axis at 1, 2, 5 of each decade, or at 1 if it spans many."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _learning(axes: Axes, record: Record) -> None:
    """Validation loss of the network as it trains, against the two closed-form fits."""
    longest = 1
    for run in record.runs.values():
        training = run["contenders"]["network"]["details"]
        losses = training["validation_loss"]
        longest = max(longest, len(losses) - 1)
        axes.plot(range(len(losses)), losses, color=COLOURS["network"], lw=1.1, alpha=0.7)
        best = training["best_epoch"]
        axes.plot([best], [losses[best]], "o", ms=4, color=COLOURS["network"])
    levels = {
        key: float(
            np.mean(
                [
                    run["contenders"][key]["details"]["validation_loss"]
                    for run in record.runs.values()
                ]
            )
        )
        for key in ("tangent", "last_layer")
    }
    for key, level in levels.items():
        # The name stands above its line, the lower one's below so that two close lines keep apart.
        below = level == min(levels.values()) and max(levels.values()) < 1.3 * level
        axes.axhline(level, color=COLOURS[key], lw=1.6)
        axes.annotate(
            CONTENDERS[key], (0.995, level), xycoords=("axes fraction", "data"),
            ha="right", va="top" if below else "bottom", xytext=(0, -3 if below else 2),
            textcoords="offset points", color=COLOURS[key], size=9, weight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0, longest)
    low, high = axes.get_ylim()
    _few_ticks(axes.yaxis, high / low)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
    axes.set_title(
        "Training passes the tangent space" if _passes(record) else "Validation loss in training"
    )
    axes.set_xlabel("epoch; a dot marks the weights that were kept")
    axes.set_ylabel("validation loss")


def _passes(record: Record) -> bool:
    """Whether in every seed training ends at a lower validation loss than the tangent fit's."""
    return all(
        min(run["contenders"]["network"]["details"]["validation_loss"])
        < run["contenders"]["tangent"]["details"]["validation_loss"]
        for run in record.runs.values()
    )


def _functions(axes: Axes, outputs: dict[str, NDArray[Any]], parts: Split, record: Record) -> None:
    """Every output on the test set: the tangent-space model's over the network's."""
    network, tangent = outputs["network"], outputs["tangent"]
    if parts.test.labels is None:
        groups = [(np.ones(network.shape, bool), COLOURS["tangent"], "")]
    else:
        true = np.zeros(network.shape, bool)
        true[np.arange(len(true)), parts.test.labels.cpu().numpy()] = True
        groups = [
            (~true, COLOURS["last_layer"], "other classes"),
            (true, COLOURS["tangent"], "true class"),
        ]
    low = min(np.quantile(network, 0.001), np.quantile(tangent, 0.001))
    high = max(np.quantile(network, 0.999), np.quantile(tangent, 0.999))
    margin = 0.06 * (high - low)
    axes.axline((0, 0), slope=1, color=RULE, lw=1, zorder=0)
    for chosen, colour, name in groups:
        x, y = network[chosen], tangent[chosen]
        keep = np.random.default_rng(0).permutation(len(x))[:4000]
        axes.scatter(
            x[keep], y[keep], s=5, color=colour, alpha=0.35 if len(keep) < 2000 else 0.18, lw=0,
            rasterized=True,
        )  # fmt: skip
        if name:
            axes.annotate(
                name, (float(np.median(x)), high + margin), ha="center", va="bottom", size=8.5,
                color=colour, weight="bold", annotation_clip=False,
            )  # fmt: skip
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.tick_params(length=0)
    axes.set_xlabel("trained network")
    axes.set_ylabel("tangent space")
    between = record.result["summary"]["tangent_to_network"]
    if "agreement" in between:
        title = f"They agree on {100 * between['agreement']['mean']:.1f} % of the test set"
    else:
        title = "Predictions on the test set"
    axes.set_title(title, pad=18)


def _distances(axes: Axes, record: Record) -> None:
    """Distances of the functions on the test set; the diagonal is that between seeds."""
    distances = record.result["summary"]["distances"]
    keys = list(CONTENDERS)
    values = np.full((len(keys), len(keys)), np.nan)
    for i, a in enumerate(keys):
        for j, b in enumerate(keys):
            value = distances.get(f"{a}/{b}", distances.get(f"{b}/{a}"))
            values[i, j] = np.nan if value is None else value
    largest = np.nanmax(values)
    smallest = np.nanmin(values)
    # Colour by the logarithm: one Gauss-Newton step can be an order of magnitude away.
    shade = np.log(values / smallest) / max(np.log(largest / smallest), 1e-9)
    axes.imshow(np.ma.masked_invalid(shade), cmap=SHEET, vmin=0, vmax=1.15, aspect="auto")
    for i in range(len(keys)):
        for j in range(len(keys)):
            known = np.isfinite(values[i, j])
            axes.text(
                j, i, f"{values[i, j]:.2f}" if known else "–", ha="center", va="center", size=10,
                weight="bold" if i == j else "normal",
                color="white" if known and shade[i, j] > 0.6 else INK,
            )  # fmt: skip
    names = [name.replace(" ", "\n", 1) for name in CONTENDERS.values()]
    axes.set_xticks(range(len(keys)), names, size=8.5)
    axes.set_yticks(range(len(keys)), names, size=8.5)
    for edge in np.arange(-0.5, len(keys)):
        axes.axhline(edge, color="white", lw=2)
        axes.axvline(edge, color="white", lw=2)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Distance of the functions", pad=18)
    if len(record.runs) > 1:
        axes.set_xlabel("on the diagonal: the same way from another seed", labelpad=7)


def _disagreeing(outputs: dict[str, NDArray[Any]], parts: Split) -> NDArray[np.int64]:
    """Test pictures to which the two give different classes, the surest disagreements first."""
    if parts.classes is None or parts.test.x.ndim != 4 or parts.test.x.shape[1] not in (1, 3):
        return np.empty(0, np.int64)
    tangent, network = outputs["tangent"], outputs["network"]
    differ = np.flatnonzero(tangent.argmax(1) != network.argmax(1))
    rows = np.arange(len(tangent))
    margin = (tangent.max(1) - tangent[rows, network.argmax(1)]) + (
        network.max(1) - network[rows, tangent.argmax(1)]
    )
    return differ[np.argsort(-margin[differ], kind="stable")][:PICTURES]


def _pictures(
    figure: Figure,
    rows: NDArray[np.int64],
    outputs: dict[str, NDArray[Any]],
    parts: Split,
) -> None:
    """A strip of the test pictures that the two see differently."""
    assert parts.test.labels is not None
    figure.text(0.03, 0.162, "Where they differ", size=10.5, weight="bold")
    figure.text(0.175, 0.162, "the true class, then what each says", size=8.5, color=FAINT)
    slot = (0.975 - 0.03) / PICTURES
    height = 0.09
    width = height * figure.get_figheight() / figure.get_figwidth()
    for place, row in enumerate(rows):
        left = 0.03 + place * slot
        axes = figure.add_axes((left, 0.04, width, height), anchor="W")
        picture = parts.test.x[row].cpu().numpy().transpose(1, 2, 0)
        picture = (picture - picture.min()) / max(float(np.ptp(picture)), 1e-9)
        axes.imshow(picture.squeeze(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_off()
        true = int(parts.test.labels[row])
        says = [("true", true, INK)] + [
            (name, int(outputs[key][row].argmax()), COLOURS[key])
            for key, name in (("tangent", "tangent"), ("network", "network"))
        ]
        for line, (name, label, colour) in enumerate(says):
            figure.text(
                left + width + 0.004, 0.04 + height * (0.72 - 0.3 * line), f"{name} {label}",
                size=7.5, color=colour, weight="bold" if label == true else "normal",
            )  # fmt: skip
