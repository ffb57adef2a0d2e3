"""Swap the layers of a network for sparse ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from jacpot.nn.masked import MaskedConv2d, MaskedLinear
from jacpot.nn.sparse import SparseConv2d, SparseLinear

__all__ = ["sparsify"]


def sparsify(module: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a copy of a network whose masked layers hold only their kept weights.

    Outputs equal those of the masked dense network to rounding. The parameters of a swapped
    layer are ``values`` of kept size and ``bias``, so gradients and an optimizer's moments shrink
    too: make the optimizer from the result.

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
    KeyError
        If a mask names no parameter of the network.
    ValueError
        If a named parameter cannot be made sparse (not the weight of a linear or
        two-dimensional convolution), or a mask is of another shape.

    Examples
    --------
    >>> import torch, jacpot
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> sparse = jacpot.nn.sparsify(network, {"0.weight": torch.rand(30, 20) < 0.1})
    >>> type(sparse[0]).__name__, type(sparse[2]).__name__
    ('SparseLinear', 'Linear')
    """
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
    done: dict[int, nn.Module] = {}
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        layer = result.get_submodule(path)
        if id(layer) in done:
            continue
        swapped = _swap(name, layer, attribute, mask)
        done[id(swapped)] = swapped
        if not path:
            return swapped
        # A layer may hang at several places of the network.
        for parent in list(result.modules()):
            for key, child in list(parent.named_children()):
                if child is layer:
                    setattr(parent, key, swapped)
    return result


def _swap(name: str, layer: nn.Module, attribute: str, mask: Tensor) -> nn.Module:
    # Subclasses may be used in other ways than by being called: attention reads the weight of
    # its output projection.
    if attribute == "weight":
        if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, MaskedLinear):
            return SparseLinear.from_linear(layer, mask)
        if isinstance(layer, nn.Conv2d) and type(layer) in (nn.Conv2d, MaskedConv2d):
            return SparseConv2d.from_conv2d(layer, mask)
    raise ValueError(
        f"parameter {name!r} of {type(layer).__name__} cannot be made sparse: only the weight "
        "of nn.Linear and nn.Conv2d can; leave it out of the masks"
    )
