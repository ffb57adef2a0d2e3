"""How much two tickets have in common: positions and signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from jacpot.nn.worn import named_parameters
from jacpot.tickets.mask import Mask, check_same_layout, chosen_mask

__all__ = ["Overlap", "overlap", "sign_agreement"]


@dataclass(frozen=True)
class Overlap:
    """Positions that two masks share.

    Attributes
    ----------
    both, first, second, numel
        Weights kept by both, by either one, and all there are.
    chance
        What ``both`` would be on average for independent masks of the same layer densities.
    layers
        The same of each parameter by name; empty for a single parameter.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> mask = Mask({"w": torch.arange(100) < 20})
    >>> itself = tickets.overlap(mask, mask)
    >>> itself.both, itself.chance, itself.jaccard, itself.excess
    (20, 4.0, 1.0, 1.0)
    """

    both: int
    first: int
    second: int
    numel: int
    chance: float
    layers: Mapping[str, Overlap]

    @property
    def jaccard(self) -> float:
        """Intersection over union, 0 to 1; of two empty masks, 1."""
        union = self.first + self.second - self.both
        return self.both / union if union else 1.0

    @property
    def expected_jaccard(self) -> float:
        """The Jaccard index at the average intersection of independent masks.

        ``d / (2 - d)`` if both keep the share ``d`` of one layer.
        """
        union = self.first + self.second - self.chance
        return self.chance / union if union else 1.0

    @property
    def excess(self) -> float:
        """Jaccard index over chance: 0 for independent masks, 1 for equal ones."""
        room = 1 - self.expected_jaccard
        return (self.jaccard - self.expected_jaccard) / room if room else 1.0

    def table(self, title: str | None = None) -> Table:
        """By parameter, to print with rich."""
        table = Table("parameter", "jaccard", "by chance", "excess", title=title)
        for name, one in {**self.layers, "all": self}.items():
            numbers = (one.jaccard, one.expected_jaccard, one.excess)
            table.add_row(name, *(f"{number:.4f}" for number in numbers))
        return table


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Overlap:
    """Compare the positions that two masks keep.

    Parameters
    ----------
    a, b
        Masks of the same parameters.

    Raises
    ------
    TypeError
        If a mask is not bool.
    ValueError
        If names or shapes differ.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> a = {"w": torch.tensor([True, True, False, False])}
    >>> b = {"w": torch.tensor([True, False, True, False])}
    >>> found = tickets.overlap(a, b)
    >>> round(found.jaccard, 3), round(found.expected_jaccard, 3)
    (0.333, 0.333)
    """
    a, b = Mask(a), Mask(b)
    check_same_layout("b", b, a)
    layers = {}
    for name, kept in a.items():
        other = b[name].to(kept.device)
        first, second, numel = int(kept.sum()), int(other.sum()), kept.numel()
        chance = first * second / numel if numel else 0.0
        layers[name] = Overlap(int((kept & other).sum()), first, second, numel, chance, {})
    parts = list(layers.values())
    return Overlap(
        sum(part.both for part in parts),
        sum(part.first for part in parts),
        sum(part.second for part in parts),
        sum(part.numel for part in parts),
        sum(part.chance for part in parts),
        layers,
    )


def sign_agreement(
    a: nn.Module, b: nn.Module, mask: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Share of weights that have the same sign in two networks, by parameter and over all.

    Half of them agree by chance. Zero agrees with zero only.

    Parameters
    ----------
    a, b
        Networks with the same parameters, for instance a ticket before and after training.
    mask
        Which weights to look at; by default those of :meth:`jacpot.Mask.ones`.

    Returns
    -------
    dict
        By parameter name, and ``"all"``. Of no weights, 1.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(3, 2)
    >>> tickets.sign_agreement(layer, layer)
    {'weight': 1.0, 'all': 1.0}
    """
    chosen = chosen_mask(a, mask)
    first, second = named_parameters(a), named_parameters(b)
    equal, count, result = 0, 0, {}
    for name, kept in chosen.items():
        on = kept.to(first[name].device)
        same = (torch.sign(first[name]) == torch.sign(second[name].to(on.device)))[on]
        result[name] = float(same.double().mean()) if same.numel() else 1.0
        equal, count = equal + int(same.sum()), count + same.numel()
    return {**result, "all": equal / count if count else 1.0}
