"""What the capture of signals needs of a convolution, where minimal filtering is faster.

See csrc/jacobian/winograd_signals.hpp for what that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot import _backend
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["backward", "conv2d", "relu"]

FEWEST_CHANNELS = 8  # that fill vectors
FEWEST_TILES = 64  # of 4 x 4, in all images, that make up for what is done to the weight


def backward(
    signals: Tensor, weight: Tensor, size: Sequence[int], seen: Tensor | None = None
) -> Tensor:
    """Take several signals of each example back through a convolution.

    Its kernel is 3 x 3, its stride and dilation are 1. Minimal filtering takes a fourth of the
    multiplications, and leaves ten times the rounding errors: in float32 about 1e-5 of the largest
    result.

    Parameters
    ----------
    signals
        ``(N, K, O, *places)``, float32 or float64, on the CPU.
    weight
        ``(O, I, 3, 3)``.
    size
        Height and width of what the layer saw, which follow from its padding of 0, 1 or 2.
    seen
        ``(N, I, *size)``, what the layer saw, if that came from a ReLU: signals are then taken back
        through the ReLU as well.

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
    >>> backward(torch.ones(1, 1, 1, 1, 1), weight, (3, 3))[0, 0, 0].round()
    tensor([[1., 2., 3.],
            [4., 5., 6.],
            [7., 8., 9.]])
    """
    n, k = signals.shape[:2]
    out = _backend.empty((n, k, weight.shape[1], *size), signals)
    if n and k and not signals[0, 0].is_contiguous():
        signals = signals.contiguous()
    seen = None if seen is None else seen.contiguous()
    _backend.core.convolution_signals(signals, weight.contiguous(), seen, out, _backend.threads())
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
    """`torch.nn.functional.conv2d`, with `backward` for the way back where that is faster."""
    pads = [1, 1] if padding == "same" else [0, 0] if padding == "valid" else _pair(padding)
    geometry = _pair(stride), _pair(dilation), groups
    if geometry != ([1, 1], [1, 1], 1) or not _is_ours(input, weight, bias, pads):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    before, seen = input, None
    node: Any = input.grad_fn
    if getattr(node, "_forward_cls", None) is _Relu and node.version == node.before._version:
        before, seen = node.before, input.detach()
    return _Convolution.apply(before, seen, weight, bias, pads)  # type: ignore[no-any-return, no-untyped-call]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`, through which `conv2d` takes signals back with its own."""
    if inplace or is_transformed() or is_forward_mode() or not input.requires_grad:
        return F.relu(input, inplace)
    return _Relu.apply(input)  # type: ignore[no-any-return, no-untyped-call]


def _pair(size: Any) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * 2 if len(sizes) == 1 else sizes


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None, pads: list[int]) -> bool:
    fixed = [weight] if bias is None else [weight, bias]
    return (
        x.requires_grad
        and x.ndim == weight.ndim == 4
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and max(pads) <= 2
        and min(s + 2 * p for s, p in zip(x.shape[2:], pads, strict=True)) >= 3
        and x.dtype in (torch.float32, torch.float64)
        and all(p.dtype == x.dtype and not p.requires_grad for p in fixed)
        and x.device.type == "cpu"
        and len(x) > 0
        and not is_transformed()
        and not is_forward_mode()
    )


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


class _Convolution(torch.autograd.Function):
    """Of x, or of what a ReLU has ``seen`` in x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        pads: list[int],
    ) -> Tensor:
        ctx.save_for_backward(weight, seen)
        ctx.pads = pads
        return torch.conv2d(x if seen is None else seen, weight, bias, 1, pads)

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> tuple[Tensor | None, ...]:
        weight, seen = ctx.saved_tensors
        back = torch.ops.jacpot.convolution_layer_backward
        return back(signals, weight, seen, ctx.pads), *[None] * 4


def _pull_back(signals: Tensor, weight: Tensor, seen: Tensor | None, pads: Sequence[int]) -> Tensor:
    """Take ``(N, K, O, *places)`` back by what is faster."""
    size = [s + 2 - 2 * p for s, p in zip(signals.shape[3:], pads, strict=True)]
    n, k = signals.shape[:2]
    if n * k * math.prod(-(-s // 4) for s in size) >= FEWEST_TILES:
        return backward(signals, weight, size, seen)
    like = signals.new_empty(()).expand(n * k, weight.shape[1], *size)
    one, wanted = [1, 1], [True, False, False]
    plain = torch.ops.aten.convolution_backward
    found: Tensor = plain(
        signals.flatten(0, 1), like, weight, None, one, pads, one, False, [0, 0], 1, wanted
    )[0].view(n, k, *like.shape[1:])
    if seen is not None:
        found = torch.ops.aten.threshold_backward(found, seen[:, None].expand_as(found), 0)
    return found


def _single(signals: Tensor, weight: Tensor, seen: Tensor | None, pads: Sequence[int]) -> Tensor:
    return _pull_back(signals[:, None], weight, seen, pads)[:, 0]


def _batched(
    info: Any,
    in_dims: tuple[int | None, ...],
    signals: Tensor,
    weight: Tensor,
    seen: Tensor | None,
    pads: Sequence[int],
) -> tuple[Tensor, int]:
    """Take K signals ``(N, O, *places)`` back at once; the result lies ``(N, K, I, *size)``."""
    assert in_dims[0] is not None
    assert in_dims[1] is None
    assert in_dims[2] is None
    return _pull_back(signals.movedim(in_dims[0], 1), weight, seen, pads), 1


_Library: Any = torch.library.Library  # untyped in PyTorch
_library = _Library("jacpot", "FRAGMENT")
_library.define(
    "convolution_layer_backward(Tensor signals, Tensor weight, Tensor? seen, int[] pads) -> Tensor"
)
_library.impl("convolution_layer_backward", _single, "CPU")
torch.library.register_vmap("jacpot::convolution_layer_backward", _batched, lib=_library)
