"""What lies between two solutions: the error along the straight line from one to the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jacpot.nn.stand_ins import copy_of
from jacpot.tickets._random import seeded
from jacpot.tickets.parametrization import bake

__all__ = ["Barrier", "barrier", "stability"]


@dataclass(frozen=True)
class Barrier:
    """The error along a path.

    Attributes
    ----------
    positions
        From 0 (the first network) to 1 (the second).
    values
        The error at each.

    Examples
    --------
    >>> from jacpot import tickets
    >>> path = tickets.Barrier(positions=(0.0, 0.5, 1.0), values=(0.1, 0.4, 0.3))
    >>> round(path.height, 3), round(path.excess, 3)
    (0.2, 0.2)
    """

    positions: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def height(self) -> float:
        """How far the error rises above the mean of the ends: linear interpolation instability.

        Frankle et al. 2020, *Linear mode connectivity and the lottery ticket hypothesis*. Zero if
        it does not rise, NaN if an error is.
        """
        middle = (self.values[0] + self.values[-1]) / 2
        return _highest(value - middle for value in self.values)

    @property
    def excess(self) -> float:
        """How far the error rises above the straight line between its ends, at the worst place.

        Entezari et al. 2022. Zero if it does not rise, NaN if an error is.
        """
        first, last = self.values[0], self.values[-1]
        pairs = zip(self.positions, self.values, strict=True)
        return _highest(value - ((1 - t) * first + t * last) for t, value in pairs)


def _highest(rises: Iterable[float]) -> float:
    """The highest or zero; NaN if there is any, which `max` may pass over."""
    rises = [0.0, *rises]
    return math.nan if any(map(math.isnan, rises)) else max(rises)


@torch.no_grad()
def barrier(
    f: Callable[[nn.Module], float],
    a: nn.Module,
    b: nn.Module,
    steps: int = 11,
    recalibrate: Iterable[Tensor] | None = None,
) -> Barrier:
    """Evaluate networks on the line between two; neither is changed, and nothing is trained.

    Parameters
    ----------
    f
        From a network, in eval mode, to its error or loss.
    a, b
        The ends, with the same parameters and buffers. Masks that they wear are theirs: the line
        is between the weights that they compute with.
    steps
        Places to look at, both ends among them.
    recalibrate
        Batches to compute the statistics of BatchNorm layers anew from at every place between the
        ends, where the average of the ends' statistics belongs to no network.

    Returns
    -------
    Barrier

    Raises
    ------
    ValueError
        If the networks differ in the names or shapes of their states, or ``steps`` is below 2.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Linear(2, 1)
    >>> tickets.barrier(lambda net: net(torch.ones(2)).item(), net, net).height
    0.0
    """
    if steps < 2:
        raise ValueError(f"argument 'steps' must be at least 2, got {steps}")
    network, other = (bake(copy_of(end)) for end in (a, b))
    first, second = ({n: v.clone() for n, v in e.state_dict().items()} for e in (network, other))
    shapes = [{name: value.shape for name, value in state.items()} for state in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError("arguments 'a' and 'b' must have the same parameters and buffers")
    batches = None if recalibrate is None else list(recalibrate)
    positions = tuple(step / (steps - 1) for step in range(steps))
    values = []
    for t in positions:
        network.load_state_dict({n: _between(first[n], second[n], t) for n in first})
        if batches is not None and 0 < t < 1:
            _recalibrate(network, batches)
        values.append(float(f(network.eval())))
    return Barrier(positions, tuple(values))


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not a.is_floating_point():
        return a if t < 0.5 else b
    return torch.lerp(a, b.to(a), t)  # exactly a where a = b


def _recalibrate(network: nn.Module, batches: Sequence[Tensor]) -> None:
    norms = [child for child in network.modules() if isinstance(child, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.eval()  # dropout stays off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
        norm.train()
    for batch in batches:
        network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def stability(
    module: nn.Module,
    train: Callable[[nn.Module], Any],
    f: Callable[[nn.Module], float],
    seeds: tuple[int, int] = (0, 1),
    steps: int = 11,
    recalibrate: Iterable[Tensor] | None = None,
) -> Barrier:
    """Train two copies of a network under different SGD noise, and look between them.

    A network whose two copies have no barrier between them is stable to SGD noise; tickets that
    are not stable do not match the dense accuracy (Frankle et al. 2020).

    Parameters
    ----------
    module
        The shared start: at initialisation, after ``k`` steps, a ticket or dense. Left as it is.
    train
        Trains a module in place; draws its noise from the global random states.
    f, steps, recalibrate
        As for :func:`barrier`.
    seeds
        Of the two trainings.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> def train(net):
    ...     net.weight.data.add_(torch.randn(1, 2))
    >>> tickets.stability(torch.nn.Linear(2, 1), train, lambda net: 1.0).height
    0.0
    """
    first, second = copy_of(module), copy_of(module)
    for seed, network in zip(seeds, (first, second), strict=True):
        with seeded(seed), torch.enable_grad():
            train(network)
    return barrier(f, first, second, steps, recalibrate)
