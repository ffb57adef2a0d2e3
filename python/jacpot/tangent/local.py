"""The rows of parameters with a use that no rule covers: derivatives of that use alone.

What the rest of the network is does not matter to them: with what the function took, and the
signals that came back to what it gave, it is differentiated by itself, example by example.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot.tangent.backward import signals
from jacpot.tangent.network import over_tensors
from jacpot.tangent.places import Place
from jacpot.tangent.rules import LayerRule, Rows, Term

__all__ = ["example_major", "local_rule", "writes"]


def local_rule(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    wanted: Sequence[int],
    places: Sequence[Place | None],
    n: int,
    place: Place,
) -> LayerRule:
    """Make the rule of one call, whose arguments are the call's tensors by their places in it.

    Parameters
    ----------
    function, args, kwargs
        The call.
    wanted
        Places of the tensors whose rows are wanted.
    places
        For each tensor where the examples are; None where there are none. If there are none
        anywhere, what the function gives is the same for all.
    n
        How many examples there are.
    place
        Where they are in what the function gave.
    """
    function = _out_of_place(function)
    one_for_all = all(p is None for p in places)
    axis = place[0]

    def one(own: Sequence[Tensor]) -> Tensor:
        ahead = iter(own)
        replaced = over_tensors([args, kwargs], lambda _: next(ahead))
        found: Tensor = function(*replaced[0], **replaced[1])
        return found.narrow(axis, 0, 1) if one_for_all else found

    def rule(delta: Tensor, **operands: Tensor) -> dict[str, Term]:
        own, axes = list(operands.values()), [None if p is None else p[0] for p in places]
        for i, p in enumerate(places):
            if p is not None:
                own[i] = example_major(own[i], p, n)
        for i in wanted:  # every example has its own copy
            own[i], axes[i] = own[i].expand(n, *own[i].shape).requires_grad_(), 0
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            given = torch.func.vmap(one, in_dims=(axes,), out_dims=axis)(own)
            given = given.flatten(axis, axis + 1).movedim(axis, 0)  # (n s, ...)
        found = signals(given, [own[i] for i in wanted], delta.transpose(0, 1))
        names = list(operands)
        return {
            names[i]: Rows(values.transpose(0, 1))
            for i, values in zip(wanted, found, strict=True)
            if values is not None
        }

    return LayerRule(rule, inspect.Signature(), "delta", "0", (), None, True, local=True)


def example_major(x: Tensor, place: Place, n: int) -> Tensor:
    """Give an axis of ``r n s`` entries as two, ``n`` and ``r s``."""
    axis, rounds = place
    each = x.shape[axis] // (n * rounds)
    split = x.reshape(*x.shape[:axis], rounds, n, each, *x.shape[axis + 1 :])
    return split.transpose(axis, axis + 1).flatten(axis + 1, axis + 2)


def _out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__
    plain: Callable[..., Any] = getattr(Tensor, name[:-1]) if writes(function) else function
    return plain


def writes(function: Callable[..., Any]) -> bool:
    """Whether this writes to its first argument, by torch's convention for names."""
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")
