"""A ReLU through which the layer after it takes signals back as well, in one pass with its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from jacpot import _backend
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["ahead_of_relu", "relu"]

LARGE = 1 << 16  # numbers; to write fewer in another order takes less time than to ask for it


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`, that layers after it can take signals back through."""
    if inplace or is_transformed() or is_forward_mode() or not input.requires_grad:
        return F.relu(input, inplace)
    return _Relu.apply(input)  # type: ignore[no-any-return, no-untyped-call]


def ahead_of_relu(x: Tensor) -> Tensor | None:
    """Give what a `relu` made this of, if it did and that still is what it was."""
    node: Any = x.grad_fn
    if getattr(node, "_forward_cls", None) is not _Relu or node.version != node.before._version:
        return None
    before: Tensor = node.before
    return before


class _Relu(torch.autograd.Function):
    """Keeps what it was given, so that the graph can lead there without it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.before, ctx.version = x, x._version
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        if is_batchedtensor(signals) and y.numel() >= LARGE and not torch.is_grad_enabled():
            return torch.ops.jacpot.relu_backward(signals, y)  # type: ignore[no-any-return]
        return _backward(signals, y)


def _backward(signals: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(signals, y, 0)  # type: ignore[no-any-return]


def _batched(
    info: Any, in_dims: tuple[int | None, ...], signals: Tensor, y: Tensor
) -> tuple[Tensor, int]:
    """Pull K signals back at once; the result lies ``(N, K, ...)``, as layers take it."""
    assert in_dims[0] is not None
    assert in_dims[1] is None
    signals = signals.movedim(in_dims[0], 1)
    out = _backend.empty(tuple(signals.shape), signals)
    y = y.unsqueeze(1).expand(signals.shape)
    return torch.ops.aten.threshold_backward.grad_input(signals, y, 0, grad_input=out), 1


_Library: Any = torch.library.Library  # untyped in PyTorch
_library = _Library("jacpot", "FRAGMENT")
_library.define("relu_backward(Tensor signals, Tensor y) -> Tensor")
_library.impl("relu_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_vmap("jacpot::relu_backward", _batched, lib=_library)
