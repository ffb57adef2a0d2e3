"""What a search for tickets leaves: the rounds, their masks, weights and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of
from jacpot.tickets._files import read_tensors, write_tensors
from jacpot.tickets.mask import Mask
from jacpot.tickets.parametrization import apply

__all__ = ["Round", "Tickets"]

_FORMAT = "jacpot.imp.round"


@dataclass(eq=False)
class Round:
    """One round: what was kept, what training made of it, and how well that did.

    Attributes
    ----------
    index
        0 is the dense network.
    mask
        What the round trained.
    metrics
        What the training function returned.
    state
        The trained ``state_dict``, pruned weights at zero.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> found = tickets.imp(torch.nn.Linear(4, 2), lambda net: {"loss": 0.5}, rounds=1)
    >>> last = found.rounds[-1]
    >>> last.index, last.mask.nnz, last.metrics
    (1, 6, {'loss': 0.5})
    """

    index: int
    mask: Mask
    metrics: dict[str, Any]
    state: Mapping[str, Tensor]

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.mask.density

    def save(self, path: Path) -> None:
        """Write the round, whole or not at all."""
        try:
            metrics = json.dumps(self.metrics)
        except TypeError as error:
            raise TypeError(
                f"argument 'train' must return metrics plain enough for JSON: {error}"
            ) from error
        tensors = {f"mask/{name}": mask for name, mask in self.mask.items()}
        tensors.update({f"state/{name}": value for name, value in self.state.items()})
        header = {
            "format": _FORMAT,
            "mask": json.dumps(list(self.mask)),
            "state": json.dumps(list(self.state)),
            "metrics": metrics,
        }
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, index: int, path: Path) -> Round:
        """Read what :meth:`save` wrote."""
        tensors, header = read_tensors(path)
        if header.get("format") != _FORMAT:
            raise ValueError(f"argument 'path': {path} is no round of a search")
        mask = Mask({name: tensors[f"mask/{name}"] for name in json.loads(header["mask"])})
        state = {name: tensors[f"state/{name}"] for name in json.loads(header["state"])}
        return cls(index, mask, json.loads(header["metrics"]), state)


@dataclass(eq=False)
class Tickets:
    """The rounds of a search.

    Attributes
    ----------
    start
        The network that every ticket starts from: at initialisation, or at the step rewound to.
    rounds
        From dense to sparse.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Linear(4, 2)
    >>> found = tickets.imp(net, lambda net: None, rounds=2, prune_fraction=0.5)
    >>> [mask.density for mask in found.masks]
    [1.0, 0.5, 0.25]
    >>> ticket = found.ticket()  # before training; found.trained() is after
    >>> torch.equal(ticket.weight, net.weight * found.mask["weight"])
    True
    """

    start: nn.Module
    rounds: list[Round]

    @property
    def mask(self) -> Mask:
        """The mask of the last round."""
        return self.rounds[-1].mask

    @property
    def masks(self) -> list[Mask]:
        """The mask of every round."""
        return [done.mask for done in self.rounds]

    def ticket(self, index: int = -1) -> nn.Module:
        """A copy of ``start`` that wears the mask of a round: the ticket before training."""
        return apply(copy_of(self.start), self.rounds[index].mask)

    def trained(self, index: int = -1) -> nn.Module:
        """A copy with the trained weights of a round, wearing its mask."""
        network = copy_of(self.start)
        network.load_state_dict(self.rounds[index].state)
        return apply(network, self.rounds[index].mask)

    def _numbers(self) -> list[str]:
        names: dict[str, None] = {}
        for done in self.rounds:
            names.update({k: None for k, v in done.metrics.items() if isinstance(v, int | float)})
        return list(names)

    def table(self, title: str | None = None) -> Table:
        """Density and every number among the metrics by round, to print with rich."""
        columns = self._numbers()
        table = Table("round", "density", *columns, title=title)
        for done in self.rounds:
            values = [done.metrics.get(name) for name in columns]
            cells = ["" if value is None else f"{value:.5g}" for value in values]
            table.add_row(str(done.index), f"{done.density:.4f}", *cells)
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Each number among the metrics against density, as a Matplotlib figure.

        Parameters
        ----------
        path
            Where to save the figure too.

        Raises
        ------
        ImportError
            If Matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        columns = self._numbers()
        count = max(len(columns), 1)
        figure = Figure(figsize=(4 * count, 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, count, squeeze=False)[0], columns, strict=False):
            points = [(d.density, d.metrics[name]) for d in self.rounds if name in d.metrics]
            axes.plot(*zip(*points, strict=True), marker="o")
            axes.set(xscale="log", xlabel="density", ylabel=name)
            axes.invert_xaxis()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
