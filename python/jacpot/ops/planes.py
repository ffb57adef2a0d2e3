"""What layers over planes, of height and width, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["pair", "register_way_back"]

_Library: Any = torch.library.Library  # untyped in PyTorch
_library = _Library("jacpot", "FRAGMENT")


def pair(size: Any) -> tuple[int, int]:
    """Give a size along height and width, where one number stands for both."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * 2 if len(sizes) == 1 else sizes


def register_way_back(name: str, arguments: str, pull_back: Callable[..., Tensor]) -> None:
    """Register an operator that takes signals back through a layer, several at once under vmap.

    Parameters
    ----------
    name
        Of the operator, in the namespace ``jacpot``.
    arguments
        Those after ``Tensor signals``, in PyTorch's schema language. The signals are all that may
        be batched.
    pull_back
        Takes signals ``(N, K, O, *places)`` and these arguments, and gives ``(N, K, I, *size)``.
    """

    def single(signals: Tensor, *rest: Any) -> Tensor:
        return pull_back(signals[:, None], *rest)[:, 0]

    def batched(
        info: Any, in_dims: tuple[Any, ...], signals: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        assert not any(isinstance(dim, int) for dim in in_dims[1:])
        return pull_back(signals.movedim(in_dims[0], 1), *rest), 1

    _library.define(f"{name}(Tensor signals, {arguments}) -> Tensor")
    _library.impl(name, single, "CPU")
    torch.library.register_vmap(f"jacpot::{name}", batched, lib=_library)
