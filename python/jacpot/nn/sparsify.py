"""Swap the layers of a network for sparse ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from jacpot.nn.masked import MaskedConv2d, MaskedLinear
from jacpot.nn.sparse import SparseConv2d, SparseLinear, zero_padding
from jacpot.nn.stand_ins import copy_of
from jacpot.nn.worn import check_module, checked_mask, named_parameters, owners

__all__ = ["can_be_sparse", "sparsify"]


def sparsify(module: nn.Module, mask: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a copy of a network whose masked layers hold only their kept weights.

    Outputs equal those of the masked dense network to rounding. The parameters of a swapped
    layer are ``values`` of kept size and ``bias``, so gradients and an optimizer's moments shrink
    too: make the optimizer from the result. Hooks move to the new layers; a layer that is used at
    several places, and a weight or bias that several layers share, stay shared.

    Parameters
    ----------
    module
        Any network. Its ``nn.Linear`` and ``nn.Conv2d`` layers, and those of
        :mod:`jacpot.nn` that are masked, are swapped.
    mask
        Boolean masks by parameter name (a :class:`jacpot.Mask`). What they do not name is left
        as it is; None takes the masks that masked layers hold.

    Returns
    -------
    nn.Module
        A new network; the given one is not touched, nothing is shared with it.

    Raises
    ------
    TypeError
        If an argument is of another type.
    ValueError
        If the mask names no parameter of the network or one that cannot be made sparse (not the
        weight of a linear or two-dimensional convolution), in any of the layers that share it, is
        of another shape, or has two masks for a shared parameter.

    Examples
    --------
    >>> import torch, jacpot
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> sparse = jacpot.nn.sparsify(network, {"0.weight": torch.rand(30, 20) < 0.1})
    >>> type(sparse[0]).__name__, type(sparse[2]).__name__
    ('SparseLinear', 'Linear')
    """
    check_module(module)
    if mask is None:
        mask = {
            f"{name}.weight" if name else "weight": layer.mask
            for name, layer in module.named_modules()
            if isinstance(layer, (MaskedLinear, MaskedConv2d))
        }
    result = copy_of(module)
    parameters = named_parameters(result)
    for name, kept in checked_mask(result, mask).items():
        values: nn.Parameter | None = None
        for layer, attribute in owners(result, parameters[name]):
            swapped = _swap(name, layer, attribute, kept)
            swapped.values = values = swapped.values if values is None else values
            if layer is result:
                return swapped
            for parent in result.modules():
                # `named_children` names a layer that hangs twice in one parent only once.
                for key, child in parent._modules.items():
                    if child is layer:
                        parent._modules[key] = swapped
    return result


def can_be_sparse(layer: nn.Module, attribute: str) -> bool:
    """Whether a parameter of a layer is one that a sparse layer can hold."""
    # Subclasses may be used in other ways than by being called: attention reads the weight of
    # its output projection.
    if type(layer) in (nn.Conv2d, MaskedConv2d):
        return attribute == "weight" and zero_padding(cast(nn.Conv2d, layer)) is not None
    return attribute == "weight" and type(layer) in (nn.Linear, MaskedLinear)


def _swap(name: str, layer: nn.Module, attribute: str, mask: Tensor) -> SparseLinear | SparseConv2d:
    if not can_be_sparse(layer, attribute):
        raise ValueError(
            f"argument 'mask': {name!r}, of {type(layer).__name__}, cannot be made sparse; only "
            "the weight of nn.Linear, and of nn.Conv2d that pads all sides alike with zeros, can"
        )
    swapped: SparseLinear | SparseConv2d
    if isinstance(layer, nn.Linear):
        swapped = SparseLinear.from_linear(layer, mask)
    else:
        swapped = SparseConv2d.from_conv2d(cast(nn.Conv2d, layer), mask)
    swapped.bias = cast(nn.Linear, layer).bias  # which other layers may share
    for hooks in _HOOKS:
        setattr(swapped, hooks, getattr(layer, hooks))
    return swapped


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
