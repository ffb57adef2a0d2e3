"""What a mask does to the paths through a network: layers cut, units left out, weights wasted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jacpot.nn.stand_ins import copy_of
from jacpot.tickets.mask import Mask, chosen_mask
from jacpot.tickets.parametrization import remove
from jacpot.tickets.score._functional import call, preserved, refuse_indices

__all__ = ["PathReport", "inspect"]


@dataclass(eq=False)
class PathReport:
    """Which of the kept weights can carry anything from input to output.

    Attributes
    ----------
    mask
        As it was given.
    effective
        The kept weights that lie on some path from an input to an output; the others are dead.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> mask = {"0.weight": torch.eye(2) > 0, "1.weight": torch.tensor([[True, False]])}
    >>> report = tickets.inspect(net, mask, torch.ones(1, 2))
    >>> report.connected, report.mask.density, report.effective_density
    (True, 0.5, 0.3333333333333333)
    """

    mask: Mask
    effective: Mask

    @property
    def connected(self) -> bool:
        """Whether any path is left from input to output."""
        return self.effective.nnz > 0

    @property
    def emptied(self) -> list[str]:
        """Parameters with no weight kept."""
        return [name for name, kept in self.mask.items() if kept.numel() and not kept.any()]

    @property
    def disconnected_units(self) -> dict[str, int]:
        """For each parameter, the output units (rows, channels) that no living weight feeds."""
        return {
            name: int((~kept.flatten(1).any(dim=1)).sum()) if kept.dim() > 1 else 0
            for name, kept in self.effective.items()
        }

    @property
    def effective_density(self) -> float:
        """Density when dead weights are removed too."""
        return self.effective.density

    def table(self, title: str | None = None) -> Table:
        """By parameter, to print with rich."""
        table = Table("parameter", "density", "effective", "units cut", title=title)
        units, alive = self.disconnected_units, self.effective.densities
        for name, density in self.mask.densities.items():
            table.add_row(name, f"{density:.4g}", f"{alive[name]:.4g}", str(units[name]))
        table.add_section()
        cut = str(sum(units.values()))
        table.add_row("all", f"{self.mask.density:.4g}", f"{self.effective_density:.4g}", cut)
        return table


def inspect(module: nn.Module, mask: Mapping[str, Tensor], x: Tensor) -> PathReport:
    """Follow the paths that a mask leaves.

    Paths are followed by sending ones through the network with every kept weight at a positive
    value and every bias and running mean at zero, in float64: what has a gradient is on a path
    (Vysogorets and Kempe 2021, *Connectivity matters*, effective sparsity).

    Parameters
    ----------
    module
        A network of linear layers, convolutions, pooling, BatchNorm, skips and activations that
        pass positive numbers on (ReLU and its kin, not sigmoids).
    mask
        What is kept.
    x
        Any batch; only its shape beyond the first dimension matters.

    Returns
    -------
    PathReport

    Raises
    ------
    TypeError
        If the input is indices of an embedding.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> mask = {"0.weight": torch.tensor([[True, True], [False, False]]),
    ...         "2.weight": torch.tensor([[True, True]])}
    >>> report = tickets.inspect(net, mask, torch.ones(1, 2))
    >>> report.effective.densities, report.disconnected_units
    ({'0.weight': 0.5, '2.weight': 0.5}, {'0.weight': 1, '2.weight': 0})
    """
    refuse_indices(module, x)
    kept = chosen_mask(module, mask)
    network = remove(copy_of(module))
    statistics = {
        f"{path}.{leaf}" if path else leaf
        for path, child in network.named_modules()
        if isinstance(child, _BatchNorm)
        for leaf in ("running_mean",)
    }

    def positive(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if name in statistics or name.rpartition(".")[2].endswith("bias"):
            return torch.zeros_like(tensor, dtype=torch.float64)
        return torch.ones_like(tensor, dtype=torch.float64)

    # Divided by the largest number of inputs of a unit, so that activations stay at most 1.
    paths = {name: on.double() / max(_fan_in(on), 1) for name, on in kept.items()}
    ones = torch.ones((1, *x.shape[1:]), dtype=torch.float64, device=x.device)
    with preserved(network, training=False):
        for weight in paths.values():
            weight.requires_grad_()
        flow = call(network, ones, paths, positive).sum()
        if flow.requires_grad:
            gradients = torch.autograd.grad(flow, list(paths.values()), materialize_grads=True)
        else:
            gradients = tuple(torch.zeros_like(weight) for weight in paths.values())
    alive = {n: on & (g > 0) for (n, on), g in zip(kept.items(), gradients, strict=True)}
    return PathReport(kept, Mask(alive))


def _fan_in(kept: Tensor) -> int:
    if kept.dim() < 2 or not kept.numel():
        return 1
    return int(kept.flatten(1).sum(dim=1).max())
