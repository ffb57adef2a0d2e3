"""Putting a mask on a module and taking it off, by parametrization.

The parameter object stays the one the optimizer holds; what the layer computes with is
``where(mask, parameter, 0)``. So a pruned weight is zero in every product whatever momentum,
weight decay or averaging do to the parameter behind it, and its gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from jacpot.nn.worn import Masked, check_writable, checked_mask, named_parameters, owners
from jacpot.tickets._parametrize import (
    original,
    parametrizations,
    refuse_another,
    register,
    unregister,
)
from jacpot.tickets.mask import Mask

__all__ = ["Masked", "applied", "applied_mask", "apply", "bake", "remove"]

M = TypeVar("M", bound=nn.Module)


def _masks(module: nn.Module) -> list[tuple[nn.Module, str, Masked]]:
    """Every mask on a parameter, with the layer and the attribute that it is on."""
    return [
        (child, leaf, mask)
        for child in module.modules()
        for leaf, mask in parametrizations(child).items()
        if isinstance(mask, Masked)
    ]


def apply(module: M, mask: Mapping[str, Tensor]) -> M:
    """Put a mask on a module, in place. Pruned weights are zero from here on, and stay zero.

    Parameters keep their identity, so an existing optimizer goes on; the masks are buffers, so
    they are in ``state_dict``, move with ``to``, and are copied and pickled with the module. A
    parameter that is shared between layers is masked in all of them. Where a mask is on a
    parameter already, the new one takes its place.

    Parameters
    ----------
    module
        Any module.
    mask
        Bool tensors by parameter name.

    Returns
    -------
    Module
        ``module``.

    Raises
    ------
    TypeError
        If a mask is not bool.
    ValueError
        If a name is no parameter of the module, a shape differs, or the parameter has another
        parametrization or belongs to a recurrent layer.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = tickets.apply(layer, {"weight": torch.tensor([[True, False]])})
    >>> layer.weight[0, 1].item()
    0.0
    >>> _ = tickets.remove(layer)
    """
    checked = checked_mask(module, mask)
    check_writable(module)
    parameters = named_parameters(module)
    worn: dict[int, list[Masked]] = {}
    for child, leaf, masked in _masks(module):
        worn.setdefault(id(original(child, leaf)), []).append(masked)
    places = {
        name: owners(module, parameters[name])
        for name in checked
        if id(parameters[name]) not in worn
    }
    for name, held in places.items():
        for child, _ in held:
            refuse_another(name, child)
    for name, kept in checked.items():
        for masked in worn.get(id(parameters[name]), ()):
            masked.mask.copy_(kept)
        for child, leaf in places.get(name, ()):
            register(child, leaf, Masked(kept.clone()))
    return module


def remove(module: M) -> M:
    """Take every mask off, in place: the parameters come back as they are behind the mask.

    Parameters
    ----------
    module
        The network.

    Returns
    -------
    Module
        The module itself.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> before = layer.weight.clone()
    >>> _ = tickets.remove(tickets.apply(layer, ~Mask.ones(layer)))
    >>> torch.equal(layer.weight, before)
    True
    """
    for child, leaf, _ in reversed(_masks(module)):
        unregister(child, leaf)
    return module


def bake(module: M) -> M:
    """Write the zeros into the parameters and take the masks off, in place: plain keys again.

    Nothing holds the zeros from then on, so do this when training is over.

    Parameters
    ----------
    module
        The network.

    Returns
    -------
    Module
        The module itself.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = tickets.bake(tickets.apply(layer, ~Mask.ones(layer)))
    >>> layer.weight.tolist()
    [[0.0, 0.0]]
    """
    with torch.no_grad():
        for child, leaf, masked in _masks(module):
            original(child, leaf).masked_fill_(~masked.mask, 0)
    return remove(module)


def applied_mask(module: nn.Module) -> Mask:
    """The mask that a module wears.

    Parameters
    ----------
    module
        The network.

    Returns
    -------
    Mask
        It names nothing where the module wears none.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> tickets.applied_mask(torch.nn.Linear(2, 1))
    Mask(0 parameters, 0 of 0 kept, density 1)
    """
    parameters = {id(p): name for name, p in named_parameters(module).items()}
    return Mask(
        {parameters[id(original(child, leaf))]: mask.mask for child, leaf, mask in _masks(module)}
    )


@contextmanager
def applied(module: M, mask: Mapping[str, Tensor]) -> Iterator[M]:
    """Wear a mask inside a ``with`` block; afterwards the module is as it was.

    Parameters
    ----------
    module
        The network.
    mask
        Bool tensors by parameter name.

    Yields
    ------
    Module
        The module itself.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> with tickets.applied(layer, ~Mask.ones(layer)):
    ...     layer(torch.ones(2)).item()
    0.0
    """
    before = applied_mask(module)
    try:
        yield apply(module, mask)
    finally:
        remove(module)
        apply(module, before)
