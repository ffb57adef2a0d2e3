"""Putting a mask on a module and taking it off, by parametrization.

The parameter object stays the one the optimizer holds; what the layer computes with is
``where(mask, parameter, 0)``. So a pruned weight is zero in every product whatever momentum,
weight decay or averaging do to the parameter behind it, and its gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jacpot.tickets._names import named_parameters, owners
from jacpot.tickets.mask import Mask

__all__ = ["Masked", "applied", "applied_mask", "apply", "bake", "remove"]

M = TypeVar("M", bound=nn.Module)


class Masked(nn.Module):
    """The parametrization ``weight -> where(mask, weight, 0)``; the mask is a buffer.

    ``where`` and not a product, so that a pruned NaN or infinity is zero too.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, position: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.position = position  # among its layer's parameters when it was put on

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with pruned entries at zero."""
        return torch.where(self.mask, weight, 0)


def _masked(child: nn.Module) -> dict[str, Masked]:
    """The masks on the parameters of one layer, by attribute name."""
    lists = getattr(child, "parametrizations", {})
    return {leaf: chain[0] for leaf, chain in lists.items() if isinstance(chain[0], Masked)}


def _original(child: nn.Module, leaf: str) -> nn.Parameter:
    original: nn.Parameter = cast(Any, child).parametrizations[leaf].original
    return original


def _register(child: nn.Module, leaf: str, masked: Masked) -> None:
    parametrize.register_parametrization(child, leaf, masked)
    # torch's injected class refuses to pickle, and shares itself with deep copies so that
    # removing a parametrization from one breaks the other. A copy is made anew instead.
    injected = type(child)
    if "__deepcopy__" in vars(injected):
        del injected.__deepcopy__  # type: ignore[attr-defined]
    injected.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]


def _unregister(child: nn.Module, leaf: str) -> None:
    position = _masked(child)[leaf].position
    parametrize.remove_parametrizations(child, leaf, leave_parametrized=False)
    names = [name for name in child._parameters if name != leaf]
    names.insert(position, leaf)  # torch appends it: the order of parameters() would change
    child._parameters = {name: child._parameters[name] for name in names}


def _reduce(child: nn.Module, protocol: Any) -> tuple[Any, ...]:
    masked = _masked(child)
    if len(masked) != len(cast(Any, child).parametrizations):
        raise RuntimeError(
            f"a {type(child).__name__} with parametrizations besides a mask cannot be copied"
        )
    state = dict(child.__dict__)
    state["_modules"] = {k: v for k, v in child._modules.items() if k != "parametrizations"}
    state["_parameters"] = dict(child._parameters)
    originals = {leaf: _original(child, leaf) for leaf in masked}
    return _rebuild, (parametrize.type_before_parametrizations(child), state, originals, masked)


def _rebuild(
    kind: type[nn.Module],
    state: dict[str, Any],
    originals: dict[str, nn.Parameter],
    masked: dict[str, Masked],
) -> nn.Module:
    child = kind.__new__(kind)
    child.__setstate__(state)  # type: ignore[no-untyped-call]
    child._parameters.update(originals)
    for leaf, parametrization in masked.items():
        _register(child, leaf, parametrization)
    return child


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
        parametrization.

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
    parameters = named_parameters(module)
    worn: dict[int, list[Masked]] = {}
    for child in module.modules():
        for leaf, masked in _masked(child).items():
            original = _original(child, leaf)
            worn.setdefault(id(original), []).append(masked)
    places = {name: owners(module, parameters[name]) for name in checked}
    for name, held in places.items():
        foreign = any(isinstance(child, parametrize.ParametrizationList) for child, _ in held)
        if foreign and id(parameters[name]) not in worn:
            raise ValueError(
                f"argument 'mask': {name!r} has another parametrization already; remove it first"
            )
    for name, kept in checked.items():
        kept = kept.to(parameters[name].device)
        if id(parameters[name]) in worn:
            for masked in worn[id(parameters[name])]:
                masked.mask.copy_(kept)
        else:
            for child, leaf in places[name]:
                position = list(child._parameters).index(leaf)
                _register(child, leaf, Masked(kept.clone(), position))
    return module


def remove(module: M) -> M:
    """Take every mask off, in place: the parameters come back as they are behind the mask.

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
    for child in list(module.modules()):
        for leaf in reversed(_masked(child)):  # the last on is the first off: see `position`
            _unregister(child, leaf)
    return module


def bake(module: M) -> M:
    """Write the zeros into the parameters and take the masks off, in place: plain keys again.

    Nothing holds the zeros from then on, so do this when training is over.
    """
    with torch.no_grad():
        for child in module.modules():
            for leaf, masked in _masked(child).items():
                original = _original(child, leaf)
                original.masked_fill_(~masked.mask, 0)
    return remove(module)


def applied_mask(module: nn.Module) -> Mask:
    """The mask that a module wears; without one, a mask that names nothing.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> tickets.applied_mask(torch.nn.Linear(2, 1))
    Mask(0 parameters, 0 of 0 kept, density 1)
    """
    parameters = {id(p): name for name, p in named_parameters(module).items()}
    return Mask(
        {
            parameters[id(_original(child, leaf))]: masked.mask
            for child in module.modules()
            for leaf, masked in _masked(child).items()
        }
    )


@contextmanager
def applied(module: M, mask: Mapping[str, Tensor]) -> Iterator[M]:
    """Wear a mask inside a ``with`` block; afterwards the module is as it was.

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
    apply(module, mask)
    try:
        yield module
    finally:
        remove(module)
        apply(module, before)


def checked_mask(module: nn.Module, mask: Mapping[str, Tensor]) -> Mask:
    """``mask`` as a :class:`Mask` whose names and shapes are those of the module's parameters."""
    checked = mask if isinstance(mask, Mask) else Mask(mask)
    parameters = named_parameters(module)
    for name, kept in checked.items():
        if name not in parameters:
            raise ValueError(
                f"argument 'mask': {name!r} is no parameter; there are {', '.join(parameters)}"
            )
        if kept.shape != parameters[name].shape:
            raise ValueError(
                f"argument 'mask': {name!r} must have shape {tuple(parameters[name].shape)}, "
                f"got {tuple(kept.shape)}"
            )
    return checked
