"""A network and its derivative along one direction of its parameters."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp

from jacpot.tangent.network import Inputs, over_tensors

__all__ = ["along", "load_forward_mode"]


# Forward mode inside a try is more than torch.compile takes in.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def along(
    function: Callable[[Mapping[str, Tensor], Inputs], Tensor],
    point: Mapping[str, Tensor],
    change: Mapping[str, Tensor],
    x: Inputs,
) -> tuple[Tensor, Tensor]:
    """Evaluate a function of parameters and inputs, and its derivative along a change of them.

    In one pass by forward mode. What has none (weight normalisation, a `torch.autograd.Function` of
    one's own, a network that takes derivatives itself) goes back twice instead: ``Jᵀ u`` is linear
    in u, and its derivative along Δ is ``J Δ``.

    Parameters
    ----------
    function
        ``function(parameters, x)``.
    point, change
        Parameters and their direction, by the same names.
    x
        Inputs.

    Returns
    -------
    value, derivative : Tensor
        Both differentiable in ``change`` and ``x``.
    """
    recording = torch.is_grad_enabled()
    try:
        # In inference mode PyTorch 2.11 gives derivatives of zero, without a word.
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            value, derivative = jvp(lambda p: function(p, x), (point,), (change,))  # type: ignore[misc]
        return value, derivative
    except RuntimeError:  # of many kinds; what is wrong with the network is so the other way too
        return _twice_back(function, point, change, x)


def _twice_back(
    function: Callable[[Mapping[str, Tensor], Inputs], Tensor],
    point: Mapping[str, Tensor],
    change: Mapping[str, Tensor],
    x: Inputs,
) -> tuple[Tensor, Tensor]:
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in point.items()}
        value = function(leaves, over_tensors(x, torch.clone))  # it may have been written to
        derivative = torch.zeros_like(value)
        if value.requires_grad:
            u = torch.zeros_like(value, requires_grad=True)
            rows = torch.autograd.grad(
                value, [*leaves.values()], u, create_graph=True, materialize_grads=True
            )
            reached = [(r, change[name]) for name, r in zip(leaves, rows, strict=True) if r.grad_fn]
            if reached:
                (derivative,) = torch.autograd.grad(
                    [r for r, _ in reached],
                    u,
                    [direction for _, direction in reached],
                    create_graph=recording,
                )
    if recording:
        return value, derivative
    return value.detach(), derivative.detach()


@functools.cache
def load_forward_mode() -> None:
    """Load what the first jvp of a process does, which uses torch.jit.script and warns."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # which, depends on the version
            warnings.simplefilter("ignore", category)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
