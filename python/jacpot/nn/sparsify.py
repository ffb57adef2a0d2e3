"""Swap the layers of a network for sparse ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from jacpot.nn.masked import MaskedConv2d, MaskedLinear
from jacpot.nn.sparse import SparseConv2d, SparseLinear, zero_padding

__all__ = ["can_be_sparse", "sparsify"]


def sparsify(module: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
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
    masks
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
    KeyError
        If a mask names no parameter of the network.
    ValueError
        If a named parameter cannot be made sparse (not the weight of a linear or
        two-dimensional convolution), in any of the layers that share it, or a mask is of another
        shape, or a shared parameter has two masks.

    Examples
    --------
    >>> import torch, jacpot
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> sparse = jacpot.nn.sparsify(network, {"0.weight": torch.rand(30, 20) < 0.1})
    >>> type(sparse[0]).__name__, type(sparse[2]).__name__
    ('SparseLinear', 'Linear')
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"argument 'module' must be an nn.Module, got {type(module).__name__}")
    if masks is not None and not isinstance(masks, Mapping):
        raise TypeError(
            f"argument 'masks' must map names to bool tensors, got {type(masks).__name__}"
        )
    if masks is None:
        masks = {
            f"{name}.weight" if name else "weight": layer.mask
            for name, layer in module.named_modules()
            if isinstance(layer, (MaskedLinear, MaskedConv2d))
        }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise KeyError(f"argument 'masks' names {name!r}, which is no parameter of the module")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name!r} must have shape {tuple(parameters[name].shape)}, "
                f"got {tuple(mask.shape)}"
            )
    result = copy.deepcopy(module)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    done: dict[int, str] = {}
    for name, mask in masks.items():
        weight = parameters[name]
        first = done.setdefault(id(weight), name)
        if first != name:
            if not torch.equal(mask.cpu(), masks[first].cpu()):
                raise ValueError(
                    f"{name!r} and {first!r} are one shared parameter, and must have one mask"
                )
            continue
        values: nn.Parameter | None = None
        for layer, attribute in _owners(result, weight):
            swapped = _swap(name, layer, attribute, mask)
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


def _owners(module: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (layer, name)
        for layer in module.modules()
        for name, held in layer._parameters.items()
        if held is parameter
    ]


def _swap(name: str, layer: nn.Module, attribute: str, mask: Tensor) -> SparseLinear | SparseConv2d:
    if not can_be_sparse(layer, attribute):
        raise ValueError(
            f"parameter {name!r} of {type(layer).__name__} cannot be made sparse: only the weight "
            "of nn.Linear, and of nn.Conv2d that pads all sides alike with zeros, can; leave it "
            "out of the masks"
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
