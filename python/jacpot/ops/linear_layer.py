"""The products of a linear layer that the capture of signals needs, where a BLAS is slow at them.

See csrc/linear_layer/linear_layer.hpp for which these are, and why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot import _backend
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["backward", "forward", "linear"]

FEW_EXAMPLES = 64  # up to here reading a weight as it lies beats packing it
SEVERAL_SIGNALS = 4  # from here on a row of the weight is worth an example's own walk
MANY_ZEROS = 0.25  # from here on leaving them out beats a BLAS that does not
LARGE_WEIGHT = 1 << 12  # below, a product takes less time than to call it from Python


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply few examples by a weight.

    Parameters
    ----------
    x
        ``(N, I)``, float32 or float64, on the CPU.
    weight, bias
        ``(O, I)`` and ``(O,)``.

    Returns
    -------
    Tensor
        ``x weightᵀ + bias``, ``(N, O)``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> forward(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[11.5000]])
    """
    y = x.new_empty(len(x), len(weight))
    bias = None if bias is None else bias.contiguous()
    _backend.core.linear_layer(_rows(x), _rows(weight), bias, y, _backend.threads())
    return y


def backward(signals: Tensor, weight: Tensor) -> Tensor:
    """Multiply several signals of each example by a weight.

    Where all signals of an example are zero, as they are behind a ReLU that is off, nothing is
    multiplied, unless the weight there is not finite: the result is that of the dense product.

    Parameters
    ----------
    signals
        ``(N, K, O)``, float32 or float64, on the CPU.
    weight
        ``(O, I)``.

    Returns
    -------
    Tensor
        ``signals weight``, ``(N, K, I)``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> signals = torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
    >>> backward(signals, torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[[ 5.,  6.],
             [10., 12.]]])
    """
    out = _backend.empty((*signals.shape[:2], weight.shape[1]), signals)
    _backend.core.linear_layer_backward(_rows(signals), _rows(weight), out, _backend.threads())
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which it calls wherever it is no slower.

    A batch of vector-Jacobian products through it, by `torch.func.vmap`, takes `backward` where the
    signals have zeros enough.
    """
    if not _is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    fixed = [weight] if bias is None else [weight, bias]
    return (
        x.ndim == weight.ndim == 2
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.dtype in (torch.float32, torch.float64)
        and all(p.dtype == x.dtype and not p.requires_grad for p in fixed)
        and x.device.type == "cpu"
        and not any(p.is_neg() for p in (x, *fixed))
        and weight.numel() >= LARGE_WEIGHT
        and (len(x) <= FEW_EXAMPLES or x.requires_grad)
        and not is_transformed()
        and not is_forward_mode()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return forward(x, weight, bias) if len(x) <= FEW_EXAMPLES else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return torch.ops.jacpot.linear_layer_backward(signals, weight), None, None


def _rows(x: Tensor) -> Tensor:
    """Give a tensor whose last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _batched(
    info: Any, in_dims: tuple[int | None, ...], signals: Tensor, weight: Tensor
) -> tuple[Tensor, int]:
    """Pull K signals ``(N, O)`` back at once; the result lies ``(N, K, I)``."""
    assert in_dims[0] is not None
    assert in_dims[1] is None
    signals = signals.movedim(in_dims[0], 0)
    if signals.stride(1) == 0 and signals.shape[1] > 1:  # the same for all examples
        return (signals[:, :1] @ weight).expand(-1, signals.shape[1], -1), 0
    one = signals[0]
    zeros = one.numel() - int(one.bool().sum())
    if info.batch_size < SEVERAL_SIGNALS or zeros < MANY_ZEROS * one.numel():
        return signals @ weight, 0
    return backward(signals.transpose(0, 1), weight), 1


_Library: Any = torch.library.Library  # untyped in PyTorch
_library = _Library("jacpot", "FRAGMENT")
_library.define("linear_layer_backward(Tensor signals, Tensor weight) -> Tensor")
_library.impl("linear_layer_backward", torch.matmul, "CPU")
torch.library.register_vmap("jacpot::linear_layer_backward", _batched, lib=_library)
