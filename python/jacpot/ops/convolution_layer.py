"""What the capture of signals needs of a convolution: a faster way back, for several at once.

Plain sums, or minimal filtering where that is faster; see csrc/jacobian/plain_signals.hpp and
winograd_signals.hpp for what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.ops.planes import pair, register_way_back
from jacpot.ops.relu import ahead_of_relu
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["Geometry", "backward", "conv2d"]

FEWEST_CHANNELS = 8  # that fill vectors
FEWEST_TILES = 64  # of 4 x 4, in all images, that make up for what filtering does to the weight


@dataclass(frozen=True)
class Geometry:
    """How a kernel is laid on an image, along height and width."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def filters(self, weight: Tensor, images: int, size: Sequence[int]) -> bool:
        """Whether minimal filtering takes less time than plain sums."""
        tiles = images * math.prod(-(-s // 4) for s in size)
        return (
            weight.shape[2:] == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and max(self.padding) <= 2
            and min(weight.shape[:2]) >= FEWEST_CHANNELS
            and tiles >= FEWEST_TILES
        )


def backward(
    signals: Tensor,
    weight: Tensor,
    size: Sequence[int],
    seen: Tensor | None = None,
    geometry: Geometry = Geometry(),
) -> Tensor:
    """Take several signals of each example back through a convolution.

    With a kernel of 3 x 3, stride and dilation of 1, and images enough, by minimal filtering: that
    takes a fourth of the multiplications, and leaves ten times the rounding errors: in float32
    about 1e-5 of the largest result.

    Parameters
    ----------
    signals
        ``(N, K, O, *places)``, float32 or float64, on the CPU.
    weight
        ``(O, I, *kernel)``.
    size
        Height and width of what the layer saw.
    seen
        ``(N, I, *size)``, what the layer saw, if that came from a ReLU: signals are then taken back
        through the ReLU as well.
    geometry
        Of the convolution.

    Returns
    -------
    Tensor
        ``(N, K, I, *size)``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or there is nothing to do.

    Examples
    --------
    >>> import torch
    >>> weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    >>> backward(torch.ones(1, 1, 1, 1, 1), weight, (3, 3))[0, 0, 0]
    tensor([[1., 2., 3.],
            [4., 5., 6.],
            [7., 8., 9.]])
    """
    n, k = signals.shape[:2]
    out = _backend.empty((n, k, weight.shape[1], *size), signals)
    if n and k and not signals[0, 0].is_contiguous():
        signals = signals.contiguous()
    seen = None if seen is None else seen.contiguous()
    weight, threads, core = weight.contiguous(), _backend.threads(), _backend.core
    if geometry.filters(weight, n * k, size):
        core.convolution_signals(signals, weight, seen, out, threads)
    else:
        laid = geometry.stride, geometry.padding, geometry.dilation
        core.convolution_plain_signals(signals, weight, seen, *laid, out, threads)
    return out


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, with `backward` for the way back."""
    if not _is_ours(input, weight, bias, groups):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dilations = pair(dilation)
    if padding == "same":
        around = [d * (size - 1) for d, size in zip(dilations, weight.shape[2:], strict=True)]
        if any(total % 2 for total in around):  # torch pads one end more than the other
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        pads = around[0] // 2, around[1] // 2
    else:
        pads = (0, 0) if padding == "valid" else pair(padding)
    before = ahead_of_relu(input)
    before, seen = (input, None) if before is None else (before, input.detach())
    geometry = Geometry(pair(stride), pads, dilations)
    return _Convolution.apply(before, seen, weight, bias, geometry)  # type: ignore[no-any-return, no-untyped-call]


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    fixed = [weight] if bias is None else [weight, bias]
    return (
        x.requires_grad
        and x.ndim == weight.ndim == 4
        and groups == 1
        and weight.shape[1] == x.shape[1] >= FEWEST_CHANNELS
        and x.dtype in (torch.float32, torch.float64)
        and all(p.dtype == x.dtype and not p.requires_grad for p in fixed)
        and x.device.type == "cpu"
        and x.numel() > 0
        and weight.numel() > 0
        and not is_transformed()
        and not is_forward_mode()
    )


class _Convolution(torch.autograd.Function):
    """Of x, or of what a ReLU has ``seen`` in x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        taken = x if seen is None else seen
        ctx.save_for_backward(weight, seen)
        ctx.back = taken.shape[2:], geometry.stride, geometry.padding, geometry.dilation
        laid = geometry.stride, geometry.padding, geometry.dilation
        return torch.conv2d(taken, weight, bias, *laid)

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> tuple[Tensor | None, ...]:
        weight, seen = ctx.saved_tensors
        back = torch.ops.jacpot.convolution_layer_backward
        return back(signals, weight, seen, *ctx.back), *[None] * 4


def _pull_back(
    signals: Tensor, weight: Tensor, seen: Tensor | None, size: Sequence[int], *laid: Sequence[int]
) -> Tensor:
    """Take ``(N, K, O, *places)`` back."""
    return backward(signals, weight, size, seen, Geometry(*map(pair, laid)))


register_way_back(
    "convolution_layer_backward",
    "Tensor weight, Tensor? seen, int[] size, int[] stride, int[] padding, int[] dilation",
    _pull_back,
)
