"""The sparse product as PyTorch operators: kernels, derivatives, transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacpot.ops.masked_matmul_cuda  # noqa: F401 - registers the CUDA side of the operators
from jacpot import _backend

__all__ = ["is_transformed", "multiply", "ops", "vmap_by_one"]

# Untyped in PyTorch.
_Library: Any = torch.library.Library
_library = _Library("jacpot", "FRAGMENT")
_library.define(
    "masked_matmul(Tensor x, Tensor values, Tensor? bias, Tensor pattern, int out_features, "
    "bool relu, bool feature_major) -> Tensor"
)
_library.define(
    "masked_matmul_backward(Tensor dy, Tensor x, Tensor values, Tensor pattern, bool want_x, "
    "bool want_values) -> (Tensor, Tensor)"
)
_library.define("compress(Tensor weight, Tensor pattern, int nnz) -> Tensor")
_library.define("expand(Tensor values, Tensor pattern, int rows, int columns) -> Tensor")


def _empty(like: Tensor, rows: int, columns: int, feature_major: bool) -> Tensor:
    if feature_major:
        return like.new_empty((columns, rows)).t()
    return like.new_empty((rows, columns))


def _is_feature_major(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1


def _forward_cpu(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Tensor,
    out_features: int,
    relu: bool,
    feature_major: bool,
) -> Tensor:
    y = _empty(x, x.shape[0], out_features, feature_major)
    _backend.core.masked_matmul(
        pattern,
        values.detach(),
        None if bias is None else bias.detach(),
        relu,
        x.detach(),
        y,
        _backend.threads(),
    )
    return y


def _backward_cpu(
    dy: Tensor, x: Tensor, values: Tensor, pattern: Tensor, want_x: bool, want_values: bool
) -> tuple[Tensor, Tensor]:
    dx, d_values = _backward_fake(dy, x, values, pattern, want_x, want_values)
    _backend.core.masked_matmul_backward(
        pattern,
        values.detach(),
        x.detach(),
        dy.detach(),
        dx if want_x else None,
        d_values if want_values else None,
        _backend.threads(),
    )
    return dx, d_values


def _forward_fake(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Tensor,
    out_features: int,
    relu: bool,
    feature_major: bool,
) -> Tensor:
    return _empty(x, x.shape[0], out_features, feature_major)


def _backward_fake(
    dy: Tensor, x: Tensor, values: Tensor, pattern: Tensor, want_x: bool, want_values: bool
) -> tuple[Tensor, Tensor]:
    # An output that is not wanted is empty: an operator has a fixed number of them.
    dx = _empty(x, x.shape[0], x.shape[1], _is_feature_major(x)) if want_x else x.new_empty(0)
    d_values = torch.empty_like(values) if want_values else values.new_empty(0)
    return dx, d_values


def _compress_cpu(weight: Tensor, pattern: Tensor, nnz: int) -> Tensor:
    values = weight.new_empty(nnz)
    _backend.core.compress(pattern, weight.detach(), values, _backend.threads())
    return values


def _expand_cpu(values: Tensor, pattern: Tensor, rows: int, columns: int) -> Tensor:
    weight = values.new_empty((rows, columns))
    _backend.core.expand(pattern, values.detach(), weight, _backend.threads())
    return weight


_library.impl("masked_matmul", _forward_cpu, "CPU")
_library.impl("masked_matmul_backward", _backward_cpu, "CPU")
_library.impl("compress", _compress_cpu, "CPU")
_library.impl("expand", _expand_cpu, "CPU")
torch.library.register_fake("jacpot::masked_matmul", _forward_fake, lib=_library)
torch.library.register_fake("jacpot::masked_matmul_backward", _backward_fake, lib=_library)
torch.library.register_fake(
    "jacpot::compress", lambda weight, pattern, nnz: weight.new_empty(nnz), lib=_library
)
torch.library.register_fake(
    "jacpot::expand",
    lambda values, pattern, rows, columns: values.new_empty((rows, columns)),
    lib=_library,
)
ops: Any = torch.ops.jacpot


# Derivatives. The forward product S(x, v) is bilinear, its gradients are Sᵀ(dy, v) and the
# product sampled on the pattern, so these operators are closed under differentiation.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, pattern, _, relu, _ = inputs
    ctx.save_for_backward(x, values, pattern, output if relu else None)
    ctx.has_bias = bias is not None


def _gradients(
    dy: Tensor, x: Tensor, values: Tensor, pattern: Tensor, want_x: bool, want_values: bool
) -> Any:
    if is_transformed():
        run: Any = _GradientsTransformed.apply
    elif torch.is_grad_enabled() or _needs_operators(dy):
        run = ops.masked_matmul_backward
    else:
        run = _backward_cpu
    return run(dy, x, values, pattern, want_x, want_values)


def is_transformed() -> bool:
    """Whether `torch.func` is at work, which takes functions but not operators all the way."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _needs_operators(x: Tensor) -> bool:
    """Whether somebody listens to the dispatcher: a graph, a tracer, a transform, a device."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, pattern, positive = ctx.saved_tensors
    if positive is not None:
        dy = dy * (positive > 0)
    want_x, want_values, want_bias = ctx.needs_input_grad[:3]
    dx = d_values = None
    if want_x or want_values:
        dx, d_values = _gradients(dy, x, values, pattern, want_x, want_values)
    return (
        dx if want_x else None,
        d_values if want_values else None,
        dy.sum(0) if ctx.has_bias and want_bias else None,
        None,
        None,
        None,
        None,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, values, pattern, want_x, want_values = inputs
    ctx.save_for_backward(dy, x, values, pattern)
    ctx.wanted = want_x, want_values


def _backward_gradient(ctx: Any, gx: Tensor, gv: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, values, pattern = ctx.saved_tensors
    has_gx, has_gv = ctx.wanted
    need_dy, need_x, need_values = ctx.needs_input_grad[:3]
    d_dy = d_x = d_values = None
    out = dy.shape[1]
    if need_dy:
        if has_gx:
            d_dy = ops.masked_matmul(gx, values, None, pattern, out, False, False)
        if has_gv:
            other = ops.masked_matmul(x, gv.contiguous(), None, pattern, out, False, False)
            d_dy = other if d_dy is None else d_dy + other
    if need_x and has_gv:
        d_x, _ = ops.masked_matmul_backward(dy, x, gv.contiguous(), pattern, True, False)
    if need_values and has_gx:
        _, d_values = ops.masked_matmul_backward(dy, gx, values, pattern, False, True)
    return d_dy, d_x, d_values, None, None, None


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, pattern, _ = inputs
    ctx.save_for_backward(pattern)
    ctx.shape = weight.shape


def _compress_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (pattern,) = ctx.saved_tensors
    return ops.expand(gradient.contiguous(), pattern, *ctx.shape), None, None


def _save_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, pattern, _, _ = inputs
    ctx.save_for_backward(pattern)
    ctx.nnz = values.shape[0]


def _expand_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (pattern,) = ctx.saved_tensors
    return ops.compress(gradient, pattern, ctx.nnz), None, None, None


for _name, _gradient, _save in (
    ("masked_matmul", _forward_gradient, _save_forward),
    ("masked_matmul_backward", _backward_gradient, _save_backward),
    ("compress", _compress_gradient, _save_compress),
    ("expand", _expand_gradient, _save_expand),
):
    torch.library.register_autograd(
        f"jacpot::{_name}", _gradient, setup_context=_save, lib=_library
    )


def vmap_by_one(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """Batch an operator by calling it for each entry in turn."""
    results = []
    for i in range(info.batch_size):
        pick = [
            a.select(d, i).contiguous() if isinstance(d, int) else a
            for a, d in zip(args, in_dims, strict=True)
        ]
        results.append(operator(*pick))
    if isinstance(results[0], tuple):
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(results), 0


def _vmap_forward(info: Any, in_dims: Any, x: Tensor, *args: Any) -> Any:
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
        return vmap_by_one(ops.masked_matmul, info, in_dims, x, *args)
    x = x.movedim(in_dims[0], 0)
    y = ops.masked_matmul(x.reshape(-1, x.shape[-1]), *args)
    return y.reshape(*x.shape[:-1], y.shape[-1]), 0


torch.library.register_vmap("jacpot::masked_matmul", _vmap_forward, lib=_library)
for _name in ("masked_matmul_backward", "compress", "expand"):
    torch.library.register_vmap(
        f"jacpot::{_name}", partial(vmap_by_one, getattr(ops, _name)), lib=_library
    )


class _Multiply(torch.autograd.Function):
    """The operator without the dispatcher's detours, which cost more than a small product."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward_cpu(*inputs)
        _save_forward(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _forward_gradient(ctx, gradients[0])


class _MultiplyTransformed(torch.autograd.Function):
    """The operator under `torch.func` and forward mode, which operators cannot register."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            return ops.masked_matmul(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_forward(ctx, inputs, output)
        ctx.settings = inputs[4], inputs[6]
        x, values, _, pattern = inputs[:4]
        ctx.save_for_forward(x, values, pattern, output if inputs[5] else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _forward_gradient(ctx, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, values, pattern, positive = ctx.saved_tensors
        dx, d_values, d_bias = tangents[:3]
        out_features, feature_major = ctx.settings
        terms = [
            ops.masked_matmul(a, v, None, pattern, out_features, False, feature_major)
            for a, v in ((dx, values), (x, d_values))
            if a is not None and v is not None
        ]
        if d_bias is not None:
            terms.append(d_bias)
        total = sum(terms[1:], terms[0])
        return total if positive is None else total * (positive > 0)


class _GradientsTransformed(torch.autograd.Function):
    """The gradients under `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            return ops.masked_matmul_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _backward_gradient(ctx, *gradients)


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    block: Tensor,
    out_features: int,
    relu: bool,
    feature_major: bool,
) -> Tensor:
    """Call the operator by the shortest way that keeps what is at work around it informed."""
    arguments = (x, values.contiguous(), bias, block, out_features, relu, feature_major)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if is_transformed() or (forward_mode and not torch.compiler.is_compiling()):
        return _MultiplyTransformed.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    if _needs_operators(x):
        result: Tensor = ops.masked_matmul(*arguments)
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Multiply.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _forward_cpu(*arguments)
