"""Convolutions and transposed ones in one to three dimensions: positions are windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.ops.jacobian_windows import Windows
from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Rows, Summed, Term

__all__ = ["convolution", "transposed_convolution"]


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def views(
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


def _batched(input: Tensor, weight: Tensor, *_: object, **__: object) -> bool:
    return input.ndim == weight.ndim


@register_layer_rule(torch.conv1d, torch.conv2d, torch.conv3d, when=_batched)
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
    a = Windows(input, kernel, _each(stride, dims), dilation, groups)
    m, k = signals.shape[:2]
    delta = signals.reshape(m, k, groups, len(weight) // groups, -1).movedim(4, 2)
    return {"weight": Outer(a, delta), "bias": Summed(delta)}


@register_layer_rule(
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, when=_batched
)
def transposed_convolution(
    signals: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> dict[str, Term]:
    """Each place of x puts a kernel into the output: the windows are those of δ."""
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    pads = zip(_each(padding, dims), _each(output_padding, dims), strict=True)
    padded = F.pad(
        signals.flatten(0, 1), [p for pad, extra in reversed([*pads]) for p in (pad, pad - extra)]
    )
    view = views(padded, kernel, _each(stride, dims), _each(dilation, dims))
    for axis, size in enumerate(input.shape[2:], 2):  # output_padding may leave room for more
        view = view.narrow(axis, 0, size)
    m, k = signals.shape[:2]
    t = math.prod(input.shape[2:])
    delta = view.movedim(1, 1 + dims).reshape(m, k, t, groups, weight[0].numel())
    x = input.reshape(m, groups, -1, t).movedim(3, 1)
    return {
        "weight": Outer(x, delta, transposed=True),
        "bias": Rows(signals.flatten(3).sum(3)),
    }
