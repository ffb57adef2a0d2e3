"""Scores that need no data: magnitude and chance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jacpot.tickets.score._functional import scored_parameters

__all__ = ["magnitude", "random"]


def magnitude(module: nn.Module, mask: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The absolute value of each weight (Han et al. 2015).

    Parameters
    ----------
    module
        The network.
    mask
        Scores of these parameters alone, at the masked weights; all that `Mask.ones` names if None.

    Returns
    -------
    dict
        Scores by parameter name.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[-2.0, 1.0]]))
    >>> tickets.score.magnitude(layer)["weight"].tolist()
    [[2.0, 1.0]]
    """
    return {name: weight.abs() for name, weight in scored_parameters(module, mask).items()}


def random(
    module: nn.Module, seed: int = 0, mask: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Uniform numbers from a generator of their own: random pruning, the baseline of all others.

    Parameters
    ----------
    module
        The network.
    seed
        Of the draw.
    mask
        Scores of these parameters alone, at the masked weights; all that `Mask.ones` names if None.

    Returns
    -------
    dict
        Scores by parameter name.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> scores = tickets.score.random(torch.nn.Linear(2, 1))
    >>> scores["weight"].shape
    torch.Size([1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device)
        for name, weight in scored_parameters(module, mask).items()
    }
