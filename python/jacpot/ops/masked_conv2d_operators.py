"""The sparse convolution as an operator of PyTorch: its derivatives, fakes, and transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.ops.bilinear import Bilinear

__all__ = ["multiply"]

# Untyped in PyTorch.
_Library: Any = torch.library.Library
_library = _Library("jacpot", "FRAGMENT")
_library.define(
    "masked_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor pattern, int out_channels, "
    "bool relu, int[] window) -> Tensor"
)
_library.define(
    "masked_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor pattern, bool want_x, "
    "bool want_values, int[] window) -> (Tensor, Tensor)"
)


def _output(x: Tensor, out_channels: int, window: list[int]) -> Tensor:
    size, stride, padding, dilation = (window[i : i + 2] for i in range(0, 8, 2))
    lengths = [
        (x.shape[a + 2] + 2 * padding[a] - dilation[a] * (size[a] - 1) - 1) // stride[a] + 1
        for a in (0, 1)
    ]
    return x.new_empty((x.shape[0], out_channels, *lengths))


def _gradients(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    want_x: bool,
    want_values: bool,
    window: list[int],
) -> tuple[Tensor, Tensor]:
    # An output that is not wanted is empty: an operator has a fixed number of them.
    dx = x.new_empty(x.shape) if want_x else x.new_empty(0)
    return dx, values.new_empty(values.shape) if want_values else values.new_empty(0)


def _forward_cpu(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Tensor,
    out_channels: int,
    relu: bool,
    window: list[int],
) -> Tensor:
    y = _output(x, out_channels, window)
    _backend.core.masked_conv2d(
        pattern,
        values.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
        relu,
        x.detach().contiguous(),
        y,
        [window[i : i + 2] for i in range(0, 8, 2)],
        _backend.threads(),
    )
    return y


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    want_x: bool,
    want_values: bool,
    window: list[int],
) -> tuple[Tensor, Tensor]:
    dx, d_values = _gradients(dy, x, values, pattern, want_x, want_values, window)
    _backend.core.masked_conv2d_backward(
        pattern,
        values.detach().contiguous(),
        x.detach().contiguous(),
        dy.detach().contiguous(),
        dx if want_x else None,
        d_values if want_values else None,
        [window[i : i + 2] for i in range(0, 8, 2)],
        _backend.threads(),
    )
    return dx, d_values


torch.library.register_fake(
    "jacpot::masked_conv2d",
    lambda x, values, bias, pattern, out_channels, relu, window: _output(x, out_channels, window),
    lib=_library,
)
torch.library.register_fake("jacpot::masked_conv2d_backward", _gradients, lib=_library)
multiply = Bilinear(_library, "masked_conv2d", _forward_cpu, _backward_cpu)
