"""Sanity checks on tickets: what they owe to their positions, and what to their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import Mask, chosen_mask
from jacpot.tickets.parametrization import applied_mask, apply, remove
from jacpot.tickets.prune import prune

__all__ = ["random_mask", "reinitialise", "sanity_checks"]

M = TypeVar("M", bound=nn.Module)


def reinitialise(module: M, seed: int = 0) -> M:
    """A copy with freshly drawn parameters, by each layer's own ``reset_parameters``.

    A mask that the module wears stays on.

    Parameters
    ----------
    module
        The network.
    seed
        Of the draw; the global generator is left as it was.

    Returns
    -------
    Module
        The copy.

    Raises
    ------
    ValueError
        If a parameter belongs to a layer that cannot reset itself.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(2, 2)
    >>> torch.equal(tickets.reinitialise(layer, 1).weight, layer.weight)
    False
    """
    mask = applied_mask(module)
    fresh = remove(copy_of(module))
    with seeded(seed), torch.no_grad():
        for name, child in fresh.named_modules():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
            elif any(True for _ in child.parameters(recurse=False)):
                raise ValueError(
                    f"argument 'module': {name or 'the module'!r} ({type(child).__name__}) holds "
                    "parameters but has no reset_parameters()"
                )
    return apply(fresh, mask)


def random_mask(mask: Mapping[str, Tensor], seed: int = 0) -> Mask:
    """A random mask with the same number of weights kept in each parameter.

    Drawn anew, not permuted from ``mask``.

    Parameters
    ----------
    mask
        Bool tensors by parameter name.
    seed
        Of the draw.

    Returns
    -------
    Mask

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> mask = Mask({"w": torch.arange(10) < 3})
    >>> tickets.random_mask(mask).densities == mask.densities
    True
    """
    layout = mask if isinstance(mask, Mask) else Mask(mask)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(kept.shape, generator=generator, device="cpu")
        for name, kept in layout.items()
    }
    return prune(scores, layout.densities, allow_empty=True)


def sanity_checks(
    module: nn.Module,
    mask: Mapping[str, Tensor],
    train: Callable[[nn.Module], Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Train a ticket and its controls, each from the same random state.

    Frankle et al. 2021, *Pruning neural networks at initialization: why are we missing the mark?*;
    Su et al. 2020, *Sanity-checking pruning methods*.

    Parameters
    ----------
    module
        The network as the ticket starts from; left as it is.
    mask
        The ticket.
    train
        Trains a module in place and returns whatever is to be compared.
    seed
        Of the shuffle, the new weights, the random mask and the trainings.

    Returns
    -------
    dict
        What ``train`` returned for ``"ticket"``, ``"shuffled"`` (the mask permuted within each
        parameter), ``"reinitialised"`` (the mask on new weights) and ``"random"`` (a random mask of
        the same layer densities).

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> layer = torch.nn.Linear(4, 1)
    >>> mask = Mask({"weight": torch.tensor([[True, False, False, False]])})
    >>> tickets.sanity_checks(layer, mask, lambda net: int((net.weight != 0).sum()))
    {'ticket': 1, 'shuffled': 1, 'reinitialised': 1, 'random': 1}
    """
    ticket = chosen_mask(module, mask)
    candidates = {
        "ticket": (module, ticket),
        "shuffled": (module, ticket.shuffle(seed)),
        "reinitialised": (reinitialise(module, seed + 1), ticket),
        "random": (module, random_mask(ticket, seed + 2)),
    }
    results = {}
    for name, (start, kept) in candidates.items():
        with seeded(seed):
            results[name] = train(apply(copy_of(start), kept))
    return results
