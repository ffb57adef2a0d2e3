"""What the capture of signals needs of a batch normalisation by running statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot import _backend
from jacpot.ops.transforms import is_forward_mode, is_transformed

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with one product for the way back.

    By running statistics the layer is a factor for each channel, of which torch's own derivative,
    taken for several signals at once, makes several passes and copies.
    """
    fixed = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if (
        training
        or running_mean is None
        or running_var is None
        or not input.requires_grad
        or any(t.requires_grad or t.dtype != input.dtype for t in fixed)
        or is_transformed()
        or is_forward_mode()
    ):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        factor = (var + eps).rsqrt()
        factor = factor if weight is None else factor * weight
        ctx.save_for_backward(factor.view(-1, *[1] * (x.ndim - 2)))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return torch.ops.jacpot.scale_signals(signals, factor), *[None] * 5


def _scale(signals: Tensor, factor: Tensor) -> Tensor:
    out = _backend.empty(tuple(signals.shape), signals)
    return torch.mul(signals, factor, out=out)


def _batched(
    info: Any, in_dims: tuple[int | None, ...], signals: Tensor, factor: Tensor
) -> tuple[Tensor, int]:
    """Scale K signals ``(N, C, ...)``; the result lies ``(N, K, C, ...)``."""
    assert in_dims[0] is not None
    return _scale(signals.movedim(in_dims[0], 1), factor), 1


_Library: Any = torch.library.Library  # untyped in PyTorch
_library = _Library("jacpot", "FRAGMENT")
_library.define("scale_signals(Tensor signals, Tensor factor) -> Tensor")
_library.impl("scale_signals", _scale, "CompositeExplicitAutograd")
torch.library.register_vmap("jacpot::scale_signals", _batched, lib=_library)
