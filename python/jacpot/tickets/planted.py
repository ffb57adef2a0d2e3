"""Planted tickets: data made by a sparse network, so that what a search finds can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import Mask
from jacpot.tickets.parametrization import apply
from jacpot.tickets.prune import prune
from jacpot.tickets.score.plain import random

__all__ = ["Planted", "plant"]


@dataclass(eq=False)
class Planted:
    """A ticket that is known to be there.

    Attributes
    ----------
    mask
        The ticket.
    teacher
        The network that made the data, wearing ``mask``.
    x, y
        Inputs, standard normal, and the teacher's outputs.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> planted = tickets.plant(torch.nn.Linear(10, 1), 0.3, 50, (10,))
    >>> guess = tickets.random_mask(planted.mask, seed=1)
    >>> tickets.overlap(planted.mask, guess).jaccard < 1
    True
    """

    mask: Mask
    teacher: nn.Module
    x: Tensor
    y: Tensor


def plant(
    module: nn.Module,
    density: float,
    n_examples: int,
    input_shape: Sequence[int],
    *,
    scale: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Hide a sparse teacher in a network and let it label random inputs.

    The teacher's kept weights are the network's own, times ``scale``: the ticket is planted at
    the initialisation, where a search that rewinds can find it.

    Parameters
    ----------
    module
        The network to be searched; left as it is.
    density
        Of the planted ticket, the same in each parameter.
    n_examples, input_shape
        Size of the data.
    scale
        Of the teacher's kept weights: above 1 they stand out.
    noise
        Standard deviation of what is added to the teacher's outputs.
    seed
        Of the ticket, the inputs and the noise.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> planted = tickets.plant(torch.nn.Linear(10, 1), 0.3, 50, (10,))
    >>> planted.mask.nnz, planted.y.shape
    (3, torch.Size([50, 1]))
    """
    mask = prune(random(module, seed), density, "layer")
    teacher = copy_of(module).eval()
    with seeded(seed, 1), torch.no_grad():
        for name in mask:
            teacher.get_parameter(name).mul_(scale)
        apply(teacher, mask)
        like = next(module.parameters())
        x = torch.randn((n_examples, *input_shape), device="cpu").to(like)
        y = teacher(x)
        y = y + noise * torch.randn(y.shape, device="cpu").to(y)
    return Planted(mask, teacher, x, y)
