"""Calling a module with other tensors in the place of its own, and copying it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["call_with", "constant", "copy_of"]

M = TypeVar("M", bound=nn.Module)


def constant(tensor: Tensor) -> Tensor:
    """Detach a tensor; what was made in inference mode is of no use outside it, but its copy is."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def call_with(
    module: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a module with other tensors in the place of its own, and leave it as it is found.

    Buffers are copies, so what the module writes to them is lost. Every place of a tensor gets its
    stand-in once: `torch.func.functional_call` takes a layer that has several names for several
    layers, and leaves the stand-ins in it.

    Parameters
    ----------
    module
        The module.
    values
        Tensors by the first of the names that parameters and buffers have.
    args, kwargs
        Arguments of the call.

    Returns
    -------
    Any
        What the module gives.

    Raises
    ------
    TypeError
        If the types of arguments and parameters do not go together.
    """
    computed = [
        (vars(child), leaf, value)
        for child in module.modules()
        for leaf, value in vars(child).items()
        if isinstance(value, Tensor)
    ]
    first: dict[int, str] = {}
    places: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for held in (child._parameters, child._buffers):
            for leaf, tensor in held.items():
                if tensor is None:
                    continue
                source = first.setdefault(id(tensor), start + leaf)
                if source in values:
                    places[start + leaf] = values[source]
                elif held is child._buffers:
                    places[start + leaf] = places[source] if source in places else tensor.clone()
    try:
        return functional_call(module, places, args, dict(kwargs or {}), tie_weights=False)
    except RuntimeError as error:
        if "type" in str(error):
            _refuse_other_types(values.values(), (*args, *(kwargs or {}).values()), error)
        raise
    finally:
        for attributes, leaf, value in computed:
            attributes[leaf] = value


def _refuse_other_types(
    values: Iterable[Tensor], given: Iterable[Any], error: RuntimeError
) -> None:
    """Name the argument where a layer failed for its type: modules may well take some others."""
    types = {value.dtype for value in values if value.is_floating_point()}
    for x in given:
        if isinstance(x, Tensor) and len(types) == 1 and x.dtype not in types:
            raise TypeError(
                f"argument 'x' must be {types.pop()} like the parameters of the module, "
                f"got {x.dtype}"
            ) from error


def copy_of(module: M) -> M:
    """Copy a module as `copy.deepcopy` does, also where it keeps weights that it computed.

    `torch.nn.utils.prune` and its like do, and make them again at every call.
    """
    computed = {
        id(value): value.detach().clone()
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(module, dict(computed))
