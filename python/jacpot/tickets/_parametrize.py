"""Parametrizations that copy, pickle and come off cleanly.

``torch.nn.utils.parametrize`` swaps the class of a layer for a new one. That class refuses to be
pickled, is shared by deep copies (so that taking the parametrization off one breaks the others),
and a parameter that comes back is put last, which changes the order of ``parameters()``.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["original", "parametrizations", "refuse_another", "register", "unregister"]


def parametrizations(child: nn.Module) -> dict[str, nn.Module]:
    """The first parametrization of each parametrized attribute of one layer."""
    lists: Any = getattr(child, "parametrizations", {})
    return {leaf: chain[0] for leaf, chain in lists.items()}


def original(child: nn.Module, leaf: str) -> nn.Parameter:
    """The parameter behind a parametrization."""
    parameter: nn.Parameter = cast(Any, child).parametrizations[leaf].original
    return parameter


def refuse_another(name: str, child: nn.Module) -> None:
    """Refuse the parameter ``name``, held by ``child``, if no parametrization would do there."""
    if isinstance(child, parametrize.ParametrizationList):
        raise ValueError(
            f"argument 'mask': {name!r} has another parametrization already; remove it first"
        )
    if isinstance(child, nn.RNNBase):
        # They keep a list of their weights from which forward reads: a mask would be ignored.
        raise ValueError(
            f"argument 'mask': {name!r} belongs to a recurrent layer, which reads its weights "
            "past any parametrization; use the cells (nn.LSTMCell, nn.GRUCell) instead"
        )


def register(child: nn.Module, leaf: str, parametrization: nn.Module) -> None:
    """Put a parametrization on; :func:`unregister` in the opposite order."""
    position = list(child._parameters).index(leaf)
    parametrize.register_parametrization(child, leaf, parametrization)
    cast(Any, child).parametrizations[leaf].position = position
    injected = type(child)
    if "__deepcopy__" in vars(injected):
        del injected.__deepcopy__  # type: ignore[attr-defined]
    injected.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]


def unregister(child: nn.Module, leaf: str) -> None:
    """Take it off: the parameter is back, itself, where it was."""
    position = cast(Any, child).parametrizations[leaf].position
    parametrize.remove_parametrizations(child, leaf, leave_parametrized=False)
    names = [name for name in child._parameters if name != leaf]
    names.insert(position, leaf)
    child._parameters = {name: child._parameters[name] for name in names}


def _reduce(child: nn.Module, protocol: Any) -> tuple[Any, ...]:
    lists = cast(Any, child).parametrizations
    if any(len(chain) != 1 or not hasattr(chain, "position") for chain in lists.values()):
        raise RuntimeError(
            f"a {type(child).__name__} with parametrizations besides a mask cannot be copied"
        )
    # As it was before, parameters in their old order.
    parameters = list(child._parameters.items())
    for leaf in reversed(list(lists)):
        parameters.insert(lists[leaf].position, (leaf, lists[leaf].original))
    state = dict(child.__dict__)
    state["_modules"] = {k: v for k, v in child._modules.items() if k != "parametrizations"}
    state["_parameters"] = dict(parameters)
    kind = parametrize.type_before_parametrizations(child)
    return _rebuild, (kind, state, parametrizations(child))


def _rebuild(
    kind: type[nn.Module], state: dict[str, Any], chosen: dict[str, nn.Module]
) -> nn.Module:
    child = kind.__new__(kind)
    child.__setstate__(state)  # type: ignore[no-untyped-call]
    for leaf, parametrization in chosen.items():
        register(child, leaf, parametrization)
    return child
