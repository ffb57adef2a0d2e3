"""Max pooling with the channels innermost, as which torch has vector code for it on the CPU.

Plane by plane, torch compares one element after the other, which takes most of the forward pass of
a small convolutional network. The way back is as fast plane by plane, and goes so: only the
indices of the largest elements have to change their layout, once for all outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = ["max_pool2d"]

FEWEST_CHANNELS = 16  # that fill vectors


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Pool as ``torch.nn.functional.max_pool2d`` does, to the last bit, and as fast or faster."""
    if (
        return_indices
        or input.is_cuda
        or input.ndim != 4
        or input.shape[1] < FEWEST_CHANNELS
        or is_functorch_wrapped_tensor(input)
        or not input.is_contiguous()
    ):
        plain: Any = F.max_pool2d
        return plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    stride = kernel_size if stride is None else stride
    window = [_pair(size) for size in (kernel_size, stride, padding, dilation)]
    return _ChannelsInnermost.apply(input, *window, ceil_mode)  # type: ignore[no-untyped-call]


def _pair(size: Any) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * 2 if len(sizes) == 1 else sizes


class _ChannelsInnermost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        turned = x.contiguous(memory_format=torch.channels_last)
        largest, index = torch.ops.aten.max_pool2d_with_indices(turned, *window)
        ctx.window = window
        ctx.save_for_backward(x, index.contiguous())
        return largest.contiguous()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, index = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return back(gradients[0], x, *ctx.window, index), *[None] * len(ctx.window)
