"""Max pooling that takes several signals of each example back at once.

Torch compares one element after the other, which takes most of the forward pass of a small
convolutional network; see csrc/max_pool/max_pool.hpp for what is done instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot import _backend
from jacpot.ops.planes import pair, register_way_back
from jacpot.ops.relu import ahead_of_relu
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["max_pool2d"]

MOST_TAPS = 254  # of a window, that a byte tells apart


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Pool as ``torch.nn.functional.max_pool2d`` does, to the last bit."""
    window = [pair(size) for size in (kernel_size, stride or kernel_size, padding, dilation)]
    places = [
        _places(size, k, s, p, d, ceil_mode)
        for size, k, s, p, d in zip(input.shape[-2:], *window, strict=True)
    ]
    if (
        return_indices
        or input.ndim != 4
        or input.numel() == 0
        or min(places) < 1
        or window[0][0] * window[0][1] > MOST_TAPS
        or input.device.type != "cpu"
        or input.dtype not in (torch.float32, torch.float64)
        or is_transformed()
        or is_forward_mode()
    ):
        plain: Any = F.max_pool2d
        return plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    before = ahead_of_relu(input)
    if before is None:
        return _MaxPool.apply(input, input, False, places, window)  # type: ignore[no-untyped-call]
    return _MaxPool.apply(before, input.detach(), True, places, window)  # type: ignore[no-untyped-call]


def _places(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Count the places of a window along an axis; 0 where torch has an error for it, or should."""
    reach = dilation * (kernel - 1) + 1
    if min(kernel, stride, dilation) < 1 or not 0 <= 2 * padding <= reach:
        return 0
    if padding and dilation > size:  # all of a window may lie in the padding
        return 0
    places = (size + 2 * padding - reach + (stride - 1 if ceil else 0)) // stride + 1
    # the last window must begin inside, or in the padding ahead
    return places - 1 if ceil and (places - 1) * stride >= size + padding else places


class _MaxPool(torch.autograd.Function):
    """Of x, or of what a ReLU gave of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pooled: Tensor,
        behind_relu: bool,
        places: Sequence[int],
        window: Sequence[Sequence[int]],
    ) -> Tensor:
        pooled = pooled.contiguous()
        out = _backend.empty((*pooled.shape[:2], *places), pooled)
        taps = torch.empty(out.shape, dtype=torch.uint8)
        kernel, stride, padding, dilation = window
        _backend.core.max_pool(
            pooled, out, taps, behind_relu, kernel, stride, padding, dilation, _backend.threads()
        )
        ctx.back = pooled.shape[2:], *window
        ctx.save_for_backward(taps)
        return out

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        return torch.ops.jacpot.max_pool_backward(signals, taps, *ctx.back), *[None] * 4


def _pull_back(
    signals: Tensor,
    taps: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Take ``(N, K, C, *places)`` back."""
    n, k, channels = signals.shape[:3]
    out = _backend.empty((n, k, channels, *size), signals)
    if n and k:
        signals = signals if signals[0, 0].is_contiguous() else signals.contiguous()
        _backend.core.max_pool_backward(
            signals, taps, out, kernel, stride, padding, dilation, _backend.threads()
        )
    return out


register_way_back(
    "max_pool_backward",
    "Tensor taps, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation",
    _pull_back,
)
