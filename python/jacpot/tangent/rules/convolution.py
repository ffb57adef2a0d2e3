"""Convolutions in one, two and three dimensions: a position is a place of the kernel's window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Summed, Term

__all__ = ["convolution", "windows"]


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def windows(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Every window that a kernel is laid on, as a view: ``(B, C, *places, *kernel)``."""
    spatial, steps = x.shape[2:], x.stride()
    places = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    ]
    return x.as_strided(
        (*x.shape[:2], *places, *kernel),
        (
            *steps[:2],
            *(step * s for step, s in zip(steps[2:], stride, strict=True)),
            *(step * d for step, d in zip(steps[2:], dilation, strict=True)),
        ),
        x.storage_offset(),
    )


@register_layer_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    signals: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> dict[str, Term]:
    """Cross-correlation: the windows of x are the activations, δ (M, K, G·O, *places)."""
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    dilation = _each(dilation, dims)
    if padding == "same":  # as torch does: an odd pad goes to the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(p // 2, p - p // 2) for p in total]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]  # type: ignore[arg-type]
    if any(p for pair in pads for p in pair):
        input = F.pad(input, [p for pair in reversed(pads) for p in pair])
    view = windows(input, kernel, _each(stride, dims), dilation)
    m, k = signals.shape[:2]
    t, inner = math.prod(view.shape[2 : 2 + dims]), weight[0].numel()
    # (M, C, *places, *kernel) -> (M, *places, C, *kernel) -> (M, T, G, C/G·kernel)
    a = view.movedim(1, 1 + dims).reshape(m, t, groups, inner)
    delta = signals.reshape(m, k, groups, -1, t).movedim(4, 2)
    return {"weight": Outer(a, delta), "bias": Summed(delta)}
