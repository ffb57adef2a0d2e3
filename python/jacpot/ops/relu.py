"""A ReLU through which the layer after it takes signals back as well, in one pass with its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["ahead_of_relu", "relu"]


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
        return torch.ops.aten.threshold_backward(signals, y, 0)  # type: ignore[no-any-return]
