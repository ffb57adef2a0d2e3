"""The study behind ``jacpot tickets``: search tickets by one method and train what was found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from jacpot import tickets
from jacpot.studies import nets
from jacpot.studies.data import Dataset
from jacpot.studies.split import Split
from jacpot.studies.steps import Steps, train_steps
from jacpot.studies.ticket_store import Store
from jacpot.tickets import Mask, score
from jacpot.tickets._random import seeded

__all__ = ["CONTROLS", "METHODS", "SCORES", "SUPERMASKS", "TicketSettings", "build", "run"]

Row = dict[str, Any]

# From (network, inputs, labels, mask, seed) to scores.
SCORES: dict[str, Callable[[nn.Module, Tensor, Tensor, Mask | None, int], Mapping[str, Tensor]]] = {
    "magnitude": lambda net, x, y, mask, seed: score.magnitude(net, mask),
    "random": lambda net, x, y, mask, seed: score.random(net, seed, mask),
    "snip": lambda net, x, y, mask, seed: score.snip(net, x, y, mask=mask),
    "grasp": lambda net, x, y, mask, seed: score.grasp(net, x, y, mask=mask),
    "synflow": lambda net, x, y, mask, seed: score.synflow(net, x, mask),
    "fisher": lambda net, x, y, mask, seed: score.fisher(net, x, mask),
    "ntk": lambda net, x, y, mask, seed: score.ntk(net, x, mask=mask),
    "ntk-alignment": lambda net, x, y, mask, seed: score.ntk(net, x, y, "alignment", mask),
}
SUPERMASKS = {"edge-popup": "edge_popup", "zhou": "zhou", "biprop": "biprop"}
METHODS = ("imp", *SCORES, *SUPERMASKS)
CONTROLS = ("reinitialised", "random")


@dataclass(frozen=True)
class TicketSettings:
    """What is searched, and how.

    Attributes
    ----------
    method
        One of `METHODS`.
    net, widths
        ``"mlp"`` or ``"cnn"`` as `jacpot.studies.nets.build` takes them, or ``"vgg"``: two 3x3
        convolutions with BatchNorm for each width, halved by pooling, and a linear layer.
    he
        Whether weights are drawn anew by He's rule, which a deep ReLU network needs.
    densities
        For pruning and supermasks: the shares to keep.
    scope
        Of pruning at initialisation.
    iterations
        Rounds of scoring.
    score_size
        Training examples that scores look at.
    weights
        Of supermasks: ``"initial"`` or ``"signed_constant"``.
    rounds, prune_fraction, rewind
        Of iterative magnitude pruning: as `jacpot.tickets.imp` takes them; every parameter is
        pruned by itself, the output layer at half the rate.
    recipe
        How each network is trained.
    """

    method: str
    net: str = "mlp"
    widths: tuple[int, ...] = (300, 100)
    he: bool = False
    densities: tuple[float, ...] = (0.1,)
    scope: str = "global"
    iterations: int = 1
    score_size: int = 512
    weights: str = "initial"
    rounds: int = 15
    prune_fraction: float = 0.2
    rewind: int | str = "init"
    recipe: Steps = field(default_factory=Steps)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"density: expected a share in (0, 1], got {density}")
            if density == 1 and self.method == "zhou":
                raise ValueError("density: expected a probability below 1 for zhou, got 1")
        if not 0 < self.prune_fraction < 1:
            raise ValueError(
                f"prune_fraction: expected a share in (0, 1), got {self.prune_fraction}"
            )
        steps = isinstance(self.rewind, int) and 0 <= self.rewind < self.recipe.steps
        if not steps and self.rewind not in ("init", "learning-rate"):
            raise ValueError(
                "rewind: expected init, learning-rate or a step below those of a training, "
                f"{self.recipe.steps}, got {self.rewind}"
            )

    @property
    def trainings(self) -> int:
        """How many a seed takes."""
        if self.method == "imp":
            return 1 + self.rounds * (1 + len(CONTROLS))
        return len(self.densities)

    def record(self, dataset: Dataset, parts: Split) -> dict[str, Any]:
        """Everything the numbers depend on but the seed, in plain values.

        How many rounds are asked for changes none of them: more go on where fewer ended.
        """
        sizes = [len(parts.train), len(parts.validation), len(parts.test)]
        data = {"data": dataset.name, "data_sha256": dataset.fingerprint(), "sizes": sizes}
        return {**data, **{key: value for key, value in asdict(self).items() if key != "rounds"}}


def build(settings: TicketSettings, parts: Split, seed: int) -> nn.Sequential:
    """The network at its initialisation."""
    shape = tuple(parts.train.x.shape[1:])
    if settings.net == "vgg":
        with seeded(seed):
            network = _vgg(shape, parts.n_outputs, settings.widths)
    else:
        network = nets.build(settings.net, shape, parts.n_outputs, settings.widths, seed)
    if settings.he:
        with seeded(seed, 1):
            for name in Mask.ones(network):
                nn.init.kaiming_normal_(network.get_parameter(name), nonlinearity="relu")
    return network.to(parts.train.x.device)


def _vgg(shape: tuple[int, ...], n_outputs: int, widths: tuple[int, ...]) -> nn.Sequential:
    if len(shape) != 3:
        raise ValueError(f"net: 'vgg' needs pictures, got examples of shape {shape}")
    layers: list[nn.Module] = []
    channels, height, width = shape
    for wide in widths:
        for before in (channels, wide):
            layers += [nn.Conv2d(before, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)]
            layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2))
        channels, height, width = wide, height // 2, width // 2
    if height * width == 0:
        raise ValueError(
            f"net: 'vgg' halves pictures {len(widths)} times, and those of shape {shape} are too "
            "small for that"
        )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, n_outputs))


def run(
    store: Store,
    settings: TicketSettings,
    parts: Split,
    seed: int,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Search and train with one seed; finished trainings are read from ``store``.

    Parameters
    ----------
    store
        Where every training is kept.
    settings, parts
        What to do, on what.
    seed
        Draws the network, the order of examples, and what controls and random scores need.
    on_row
        Called with each row, when its training is done or found done.

    Returns
    -------
    list of dict
        A row a training: ``kind``, ``seed``, ``density`` and what `train_steps` returns; of pruned
        networks also ``emptied`` (parameters without a weight), ``effective_density`` and
        ``connected``.
    """
    rows: list[Row] = []

    def keep(kind: str, density: float, metrics: Row) -> None:
        rows.append({"kind": kind, "seed": seed, "density": density, **metrics})
        on_row(rows[-1])

    network = build(settings, parts, seed)
    if settings.method == "imp":
        _imp(store, settings, parts, seed, network, keep)
    else:
        work = _supermask if settings.method in SUPERMASKS else _pruned
        for density in settings.densities:

            def compute(density: float = density) -> Row:
                return work(settings, parts, seed, network, density)

            row = store.training(f"seed-{seed}-density-{density:g}", compute)
            keep(settings.method, row.pop("density"), row)
    return rows


def _imp(
    store: Store,
    settings: TicketSettings,
    parts: Split,
    seed: int,
    network: nn.Module,
    keep: Callable[[str, float, Row], None],
) -> None:
    def train(module: nn.Module, start: int = 0, stop: int | None = None) -> Row:
        return train_steps(module, parts, settings.recipe, start, stop)

    output = list(Mask.ones(network))[-1]
    found = tickets.imp(
        network,
        train,
        rounds=settings.rounds,
        prune_fraction=settings.prune_fraction,
        rewind=settings.rewind,  # type: ignore[arg-type]
        directory=store.trainings / f"seed-{seed}-search",
        layer_fractions={output: settings.prune_fraction / 2},
        scope="layer",
        seed=seed,
        on_round=lambda done: keep("ticket", done.density, done.metrics),
    )
    for done in found.rounds[1:]:
        for number, kind in enumerate(CONTROLS):

            def compute(kind: str = kind, number: int = number, done: Any = done) -> Row:
                with seeded(seed, 1000 + done.index, number):
                    if kind == "random":
                        mask = tickets.random_mask(done.mask, seed)
                        return train(tickets.apply(copy.deepcopy(found.start), mask))
                    return train(tickets.apply(tickets.reinitialise(network, seed + 1), done.mask))

            keep(
                kind, done.density, store.training(f"seed-{seed}-{kind}-{done.index:03d}", compute)
            )


def _pruned(
    settings: TicketSettings, parts: Split, seed: int, network: nn.Module, density: float
) -> Row:
    x = parts.train.x[: settings.score_size]
    labels = parts.train.labels
    y = parts.train.targets[: len(x)] if labels is None else labels[: len(x)]
    rank = SCORES[settings.method]

    def scored(mask: Mask | None) -> Mapping[str, Tensor]:
        return rank(network, x, y, mask, seed)

    if density == 1:
        mask = Mask.ones(network)
    else:
        scope = cast(tickets.Scope, settings.scope)
        mask = tickets.prune_iteratively(
            scored, density, settings.iterations, scope, allow_empty=True
        )
    paths = tickets.inspect(network, mask, x)
    with seeded(seed, 1):
        metrics = train_steps(tickets.apply(copy.deepcopy(network), mask), parts, settings.recipe)
    return {
        "density": mask.density,
        **metrics,
        "emptied": len(paths.emptied),
        "parameters": len(mask),
        "effective_density": paths.effective_density,
        "connected": paths.connected,
    }


def _supermask(
    settings: TicketSettings, parts: Split, seed: int, network: nn.Module, density: float
) -> Row:
    hidden = tickets.supermask(
        network,
        SUPERMASKS[settings.method],  # type: ignore[arg-type]
        density,
        weights=settings.weights,  # type: ignore[arg-type]
        seed=seed,
    )
    frozen = {n: p.clone() for n, p in hidden.named_parameters() if not p.requires_grad}
    with seeded(seed, 1):
        metrics = train_steps(hidden, parts, settings.recipe)
    now = dict(hidden.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    return {"density": hidden.mask().density, **metrics}
