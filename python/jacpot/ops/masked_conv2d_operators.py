"""The sparse convolution as an operator of PyTorch: its derivatives, fakes, and transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.ops.masked_matmul_operators import is_transformed, vmap_by_one

__all__ = ["multiply"]

# Untyped in PyTorch.
_Library: Any = torch.library.Library
_library = _Library("jacpot", "FRAGMENT")
_library.define(
    "masked_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor pattern, int out_channels, "
    "int[] window, bool relu) -> Tensor"
)
_library.define(
    "masked_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor pattern, int[] window, "
    "bool want_x, bool want_values) -> (Tensor, Tensor)"
)
_ops: Any = torch.ops.jacpot


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
    window: list[int],
    want_x: bool,
    want_values: bool,
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
    window: list[int],
    relu: bool,
) -> Tensor:
    y = _output(x, out_channels, window)
    _backend.core.masked_conv2d(
        pattern,
        values.detach(),
        None if bias is None else bias.detach(),
        relu,
        x.detach(),
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
    window: list[int],
    want_x: bool,
    want_values: bool,
) -> tuple[Tensor, Tensor]:
    dx, d_values = _gradients(dy, x, values, pattern, window, want_x, want_values)
    _backend.core.masked_conv2d_backward(
        pattern,
        values.detach(),
        x.detach(),
        dy.detach(),
        dx if want_x else None,
        d_values if want_values else None,
        [window[i : i + 2] for i in range(0, 8, 2)],
        _backend.threads(),
    )
    return dx, d_values


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, pattern, _, window, relu = inputs
    ctx.save_for_backward(x, values, pattern, output if relu else None)
    ctx.has_bias, ctx.window = bias is not None, window


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, pattern, positive = ctx.saved_tensors
    if positive is not None:
        dy = dy * (positive > 0)
    want_x, want_values, want_bias = ctx.needs_input_grad[:3]
    dx = d_values = None
    if want_x or want_values:
        dx, d_values = _differentiate(
            dy.contiguous(), x, values, pattern, ctx.window, want_x, want_values
        )
    return (
        dx if want_x else None,
        d_values if want_values else None,
        dy.sum((0, 2, 3)) if ctx.has_bias and want_bias else None,
        *(None,) * 4,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, values, pattern, window, want_x, want_values = inputs
    ctx.save_for_backward(dy, x, values, pattern)
    ctx.window, ctx.wanted = window, (want_x, want_values)


def _backward_gradient(ctx: Any, gx: Tensor, gv: Tensor) -> tuple[Tensor | None, ...]:
    # The convolution is linear in x and in the values, and so are its gradients.
    dy, x, values, pattern = ctx.saved_tensors
    has_gx, has_gv = ctx.wanted
    need_dy, need_x, need_values = ctx.needs_input_grad[:3]
    gx, gv, out, window = gx.contiguous(), gv.contiguous(), dy.shape[1], ctx.window
    d_dy = d_x = d_values = None
    if need_dy and has_gx:
        d_dy = _ops.masked_conv2d(gx, values, None, pattern, out, window, False)
    if need_dy and has_gv:
        other = _ops.masked_conv2d(x, gv, None, pattern, out, window, False)
        d_dy = other if d_dy is None else d_dy + other
    if need_x and has_gv:
        d_x, _ = _ops.masked_conv2d_backward(dy, x, gv, pattern, window, True, False)
    if need_values and has_gx:
        _, d_values = _ops.masked_conv2d_backward(dy, gx, values, pattern, window, False, True)
    return d_dy, d_x, d_values, *(None,) * 4


_library.impl("masked_conv2d", _forward_cpu, "CPU")
_library.impl("masked_conv2d_backward", _backward_cpu, "CPU")
torch.library.register_fake(
    "jacpot::masked_conv2d",
    lambda x, values, bias, pattern, out_channels, window, relu: _output(x, out_channels, window),
    lib=_library,
)
torch.library.register_fake("jacpot::masked_conv2d_backward", _gradients, lib=_library)
torch.library.register_autograd(
    "jacpot::masked_conv2d", _forward_gradient, setup_context=_save_forward, lib=_library
)
torch.library.register_autograd(
    "jacpot::masked_conv2d_backward", _backward_gradient, setup_context=_save_backward, lib=_library
)


def _vmap_forward(info: Any, in_dims: Any, x: Tensor, *args: Any) -> Any:
    if in_dims[0] is None or any(isinstance(d, int) for d in in_dims[1:]):
        return vmap_by_one(_ops.masked_conv2d, info, in_dims, x, *args)
    x = x.movedim(in_dims[0], 0)
    y = _ops.masked_conv2d(x.flatten(0, 1).contiguous(), *args)
    return y.unflatten(0, x.shape[:2]), 0


torch.library.register_vmap("jacpot::masked_conv2d", _vmap_forward, lib=_library)
torch.library.register_vmap(
    "jacpot::masked_conv2d_backward",
    partial(vmap_by_one, _ops.masked_conv2d_backward),
    lib=_library,
)


class _Transformed(torch.autograd.Function):
    """The operator under `torch.func` and forward mode, which operators cannot register."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            return _ops.masked_conv2d(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_forward(ctx, inputs, output)
        x, values, _, pattern, ctx.out_channels = inputs[:5]
        ctx.save_for_forward(x, values, pattern, output if inputs[6] else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _forward_gradient(ctx, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, values, pattern, positive = ctx.saved_tensors
        dx, d_values, d_bias = tangents[:3]
        terms = [
            _ops.masked_conv2d(
                a.contiguous(),
                v.contiguous(),
                None,
                pattern,
                ctx.out_channels,
                ctx.window,
                False,
            )
            for a, v in ((dx, values), (x, d_values))
            if a is not None and v is not None
        ]
        if d_bias is not None:
            like = terms[0] if terms else _output(x, ctx.out_channels, ctx.window)
            terms.append(d_bias[:, None, None].expand_as(like))
        total = sum(terms[1:], terms[0])
        return total if positive is None else total * (positive > 0)


class _GradientsTransformed(torch.autograd.Function):
    """The gradients under `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            return _ops.masked_conv2d_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _backward_gradient(ctx, *gradients)


def _differentiate(*arguments: Any) -> Any:
    if is_transformed():
        return _GradientsTransformed.apply(*arguments)  # type: ignore[no-untyped-call]
    return _ops.masked_conv2d_backward(*arguments)


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    block: Tensor,
    out_channels: int,
    window: list[int],
    relu: bool,
) -> Tensor:
    """Call the operator in the way that what is at work around it understands."""
    arguments = (x.contiguous(), values.contiguous(), bias, block, out_channels, window, relu)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if is_transformed() or (forward_mode and not torch.compiler.is_compiling()):
        return _Transformed.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    result: Tensor = _ops.masked_conv2d(*arguments)
    return result
