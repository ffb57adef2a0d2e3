"""The study behind ``jacpot compare``: does training find the best of the tangent space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import jacpot
from jacpot.studies import contenders, measures, nets
from jacpot.studies.contenders import CONTENDERS, RIDGES, Fitted
from jacpot.studies.data import Dataset
from jacpot.studies.record import Record
from jacpot.studies.split import Split
from jacpot.studies.training import Recipe, predict

__all__ = ["Settings", "describe", "run", "run_seed", "settings_record", "summarise"]

Progress = Callable[[str], None]

# Test examples on which the kernel is compared before and after training.
KERNEL_EXAMPLES = 500


@dataclass(frozen=True)
class Settings:
    """What is compared, on what.

    Attributes
    ----------
    net, widths
        As `jacpot.studies.nets.build` takes them.
    ridges
        Ridges to choose from on the validation set, in units of the kernel's mean diagonal.
    train_size, test_size
        As `jacpot.studies.split.split` takes them.
    tol
        Relative residual of the tangent-space fit.
    recipe
        How the network is trained.
    device
        Where networks are trained. The tangent space is fitted on the CPU.
    """

    net: str = "mlp"
    widths: tuple[int, ...] = (256, 256)
    ridges: tuple[float, ...] = RIDGES
    train_size: int | None = None
    test_size: int | None = None
    tol: float = 1e-4
    recipe: Recipe = field(default_factory=Recipe)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.ridges or any(not 0 <= ridge < float("inf") for ridge in self.ridges):
            raise ValueError(
                f"ridge: expected finite numbers that are not negative, got {list(self.ridges)}"
            )
        if not 0 < self.tol < 1:
            raise ValueError(f"tol: expected a number between 0 and 1, got {self.tol}")


def settings_record(settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """Everything the numbers of one seed depend on, in plain values."""
    return {
        "data": dataset.name,
        "data_sha256": dataset.fingerprint(),
        **asdict(settings),
    }


def describe(settings: Settings, dataset: Dataset, parts: Split) -> dict[str, Any]:
    """Say which data, how many of them and how large a network, in plain values.

    Raises
    ------
    ValueError
        If the network cannot be built for the data.
    """
    return {
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "shape": list(parts.train.x.shape[1:]),
            "classes": parts.classes,
            "outputs": parts.n_outputs,
            "train": len(parts.train),
            "validation": len(parts.validation),
            "test": len(parts.test),
        },
        "parameters": sum(value.numel() for value in _network(settings, parts, 0).parameters()),
    }


def run(
    record: Record,
    settings: Settings,
    parts: Split,
    seeds: Iterable[int],
    progress: Callable[[int, str], None] = lambda seed, stage: None,
) -> None:
    """Run the seeds that ``record`` does not hold yet; keep each as soon as it is finished.

    Parameters
    ----------
    record
        Where finished seeds are kept. An interrupt leaves it whole, with a summary of them.
    settings, parts
        What to compare, on what.
    seeds
        Each draws the initial network and the order of the training examples. The split of the
        data is the same for all, so that the spread over seeds is that of the networks.
    progress
        Called with the seed and a line of text as the work goes on.
    """
    try:
        for seed in seeds:
            if seed not in record.runs:
                numbers, outputs = run_seed(settings, parts, seed, partial(progress, seed))
                record.add(seed, numbers, outputs)
    finally:
        record.write({"summary": summarise(record)})


def run_seed(
    settings: Settings, parts: Split, seed: int, progress: Progress = lambda stage: None
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Fit the four contenders from one random network and measure them.

    Parameters
    ----------
    settings, parts
        What to compare, on what.
    seed
        Draws the network and the order of the training examples.
    progress
        Called with a line of text as the work goes on.

    Returns
    -------
    numbers : dict
        ``contenders`` (errors, time, how far the parameters moved, by contender) and
        ``tangent_to_network`` (how far apart those two are).
    outputs : dict
        Outputs on the test set by contender, ``(N, K)``.
    """
    network = _network(settings, parts, seed)
    start = {name: value.detach() for name, value in network.named_parameters()}
    progress("last layer")
    fitted: dict[str, Fitted] = {
        "last_layer": contenders.last_layer(network, parts, settings.ridges),
        "tangent": contenders.tangent(network, parts, settings.ridges, settings.tol, progress),
        "network": contenders.trained(network, parts, settings.recipe, seed, progress),
    }
    fitted["one_step"] = contenders.one_step(network, fitted["tangent"])
    progress("measuring")
    length = measures.norm(start)
    rows: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for key in CONTENDERS:
        one = fitted[key]
        outputs[key] = predict(one.function, parts.test.x)
        on_train = predict(one.function, parts.train.x)
        on_validation = predict(one.function, parts.validation.x)
        rows[key] = {
            "train_error": parts.error(on_train, parts.train),
            "validation_error": parts.error(on_validation, parts.validation),
            "test_error": parts.error(outputs[key], parts.test),
            "train_loss": parts.loss(on_train, parts.train),
            "test_loss": parts.loss(outputs[key], parts.test),
            "relative_displacement": measures.norm(one.displacement) / length,
            "seconds": one.seconds,
            "details": one.details,
        }
    numbers = {
        "contenders": rows,
        "tangent_to_network": _between(network, fitted, outputs, parts),
    }
    return numbers, {key: value.cpu().numpy() for key, value in outputs.items()}


def _network(settings: Settings, parts: Split, seed: int) -> nn.Sequential:
    shape = tuple(parts.train.x.shape[1:])
    return nets.build(settings.net, shape, parts.n_outputs, settings.widths, seed).to(
        settings.device
    )


def _between(
    network: nn.Module, fitted: dict[str, Fitted], outputs: dict[str, Tensor], parts: Split
) -> dict[str, float]:
    final = fitted["network"].function
    assert isinstance(final, nn.Module)
    probe = parts.test.x[:KERNEL_EXAMPLES]
    before, after = (jacpot.ntk(module, probe, outputs="trace") for module in (network, final))
    between = {
        "distance": measures.distance(outputs["tangent"], outputs["network"]),
        "angle": measures.angle(fitted["tangent"].displacement, fitted["network"].displacement),
    }
    change = measures.kernel_change(before, after)
    if not math.isnan(change):
        between["kernel_change"] = change
    if parts.classes is not None:
        between["agreement"] = measures.agreement(outputs["tangent"], outputs["network"])
    return between


def summarise(record: Record) -> dict[str, Any]:
    """Mean and spread over the finished seeds.

    Parameters
    ----------
    record
        With its runs.

    Returns
    -------
    dict
        ``contenders`` and ``tangent_to_network`` as in the runs, each number as ``{"mean", "std"}``
        (the deviation of a sample, None for a single seed), and ``distances``: function distance
        on the test set by pair of contenders, ``"a/b"`` from the same θ0, ``"a/a"`` between
        seeds (None for a single seed).
    """
    runs = [record.runs[seed] for seed in sorted(record.runs)]
    if not runs:
        return {}
    rows = {
        key: {
            name: _spread([run["contenders"][key][name] for run in runs])
            for name, value in runs[0]["contenders"][key].items()
            if not isinstance(value, dict)
        }
        for key in CONTENDERS
    }
    between = {
        name: _spread([run["tangent_to_network"][name] for run in runs])
        for name in runs[0]["tangent_to_network"]
        if all(name in run["tangent_to_network"] for run in runs)
    }
    outputs = [
        {key: torch.from_numpy(value) for key, value in record.arrays(seed).items()}
        for seed in sorted(record.runs)
    ]
    distances: dict[str, float | None] = {}
    for a, b in combinations(CONTENDERS, 2):
        distances[f"{a}/{b}"] = _mean([measures.distance(one[a], one[b]) for one in outputs])
    for a in CONTENDERS:
        distances[f"{a}/{a}"] = _mean(
            [measures.distance(one[a], two[a]) for one, two in combinations(outputs, 2)]
        )
    return {"contenders": rows, "tangent_to_network": between, "distances": distances}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
