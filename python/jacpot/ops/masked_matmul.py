"""Products with a sparse masked weight: time falls with the kept entries, in training too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import jacpot.ops.masked_matmul_cuda  # noqa: F401 - registers the CUDA side of the operators
from jacpot import _backend
from jacpot.ops.pattern import Pattern

__all__ = [
    "compress",
    "dense_is_faster",
    "expand",
    "expand_block",
    "masked_matmul",
    "product",
]

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
_ops = torch.ops.jacpot


# Derivatives. The forward product S(x, v) is bilinear, its gradients are Sᵀ(dy, v) and the
# product sampled on the pattern, so these operators are closed under differentiation.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, pattern, _, relu, _ = inputs
    ctx.save_for_backward(x, values, pattern, output if relu else None)
    ctx.has_bias = bias is not None


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, pattern, positive = ctx.saved_tensors
    if positive is not None:
        dy = dy * (positive > 0)
    want_x, want_values, want_bias = ctx.needs_input_grad[:3]
    dx = d_values = None
    if want_x or want_values:
        dx, d_values = _ops.masked_matmul_backward(dy, x, values, pattern, want_x, want_values)
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
            d_dy = _ops.masked_matmul(gx, values, None, pattern, out, False, False)
        if has_gv:
            other = _ops.masked_matmul(x, gv.contiguous(), None, pattern, out, False, False)
            d_dy = other if d_dy is None else d_dy + other
    if need_x and has_gv:
        d_x, _ = _ops.masked_matmul_backward(dy, x, gv.contiguous(), pattern, True, False)
    if need_values and has_gx:
        _, d_values = _ops.masked_matmul_backward(dy, gx, values, pattern, False, True)
    return d_dy, d_x, d_values, None, None, None


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, pattern, _ = inputs
    ctx.save_for_backward(pattern)
    ctx.shape = weight.shape


def _compress_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (pattern,) = ctx.saved_tensors
    return _ops.expand(gradient.contiguous(), pattern, *ctx.shape), None, None


def _save_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, pattern, _, _ = inputs
    ctx.save_for_backward(pattern)
    ctx.nnz = values.shape[0]


def _expand_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (pattern,) = ctx.saved_tensors
    return _ops.compress(gradient, pattern, ctx.nnz), None, None, None


for _name, _gradient, _save in (
    ("masked_matmul", _forward_gradient, _save_forward),
    ("masked_matmul_backward", _backward_gradient, _save_backward),
    ("compress", _compress_gradient, _save_compress),
    ("expand", _expand_gradient, _save_expand),
):
    torch.library.register_autograd(
        f"jacpot::{_name}", _gradient, setup_context=_save, lib=_library
    )


def compress(weight: Tensor, pattern: Pattern) -> Tensor:
    """Gather the kept entries of ``weight (out, in)``: see :meth:`Pattern.compress`."""
    result: Tensor = _ops.compress(weight, pattern.block, pattern.nnz)
    return result


def expand(values: Tensor, pattern: Pattern) -> Tensor:
    """Put ``values (nnz,)`` in place: see :meth:`Pattern.expand`."""
    return expand_block(values, pattern.block, pattern.shape)


def masked_matmul(
    x: Any,
    values: Any,
    pattern: Pattern,
    bias: Any = None,
    *,
    relu: bool = False,
    layout: str = "row",
    method: str = "auto",
) -> Any:
    """Multiply activations with a sparse weight: ``x @ W.T + bias``.

    Parameters
    ----------
    x
        ``(..., in)``, float32 or float64, NumPy or PyTorch; any strides.
    values
        ``(nnz,)``: kept entries of the weight in row order (:meth:`Pattern.compress`), of the
        dtype of x.
    pattern
        Which entries of the weight ``(out, in)`` are kept.
    bias
        ``(out,)`` or None.
    relu
        Apply ``max(·, 0)`` to the result, at no cost.
    layout
        How the result lies in memory: ``"row"``, or ``"feature"`` for strides of ``(1, N)``
        (with leading dimensions flattened to N). A sequence of sparse layers that keeps
        ``"feature"`` between them needs no transposes; values and shapes are the same.
    method
        ``"sparse"``, ``"dense"`` (expand the weight and multiply), or ``"auto"``, which takes the
        one that a measured model expects to be faster.

    Returns
    -------
    Tensor or numpy.ndarray
        ``(..., out)``, of the kind of x. Differentiable with regard to x, values and bias,
        any number of times.

    Raises
    ------
    TypeError
        If dtypes are not float32 or float64, or differ.
    ValueError
        If shapes or devices do not fit, or the layout is unknown.

    Examples
    --------
    >>> import torch, jacpot
    >>> pattern = jacpot.Pattern(torch.tensor([[True, False, True], [False, False, True]]))
    >>> jacpot.masked_matmul(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(3), pattern)
    tensor([[4., 3.]])
    """
    if not isinstance(x, Tensor):
        arrays = [None if a is None else torch.as_tensor(a) for a in (x, values, bias)]
        return masked_matmul(
            arrays[0], arrays[1], pattern, arrays[2], relu=relu, layout=layout, method=method
        ).numpy()
    return product(
        x,
        values,
        pattern.block,
        pattern.shape,
        pattern.nnz,
        bias,
        relu=relu,
        layout=layout,
        method=method,
    )


def product(
    x: Tensor,
    values: Tensor,
    block: Tensor,
    shape: tuple[int, int],
    nnz: int,
    bias: Tensor | None,
    *,
    relu: bool = False,
    layout: str = "row",
    method: str = "auto",
) -> Tensor:
    """Do what :func:`masked_matmul` does, with a pattern given by its block, shape and nnz."""
    out_features, in_features = shape
    if layout not in ("row", "feature"):
        raise ValueError(f"argument 'layout' must be 'row' or 'feature', got {layout!r}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"argument 'x' must have shape (..., {in_features}) for a pattern of shape "
            f"{shape}, got {tuple(x.shape)}"
        )
    if values.shape != (nnz,):
        raise ValueError(f"argument 'values' must have shape ({nnz},), got {tuple(values.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"argument 'bias' must have shape ({out_features},), got {tuple(bias.shape)}"
        )
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), in_features)
    feature_major = layout == "feature"
    if _takes_dense(method, rows, nnz, shape):
        y = _dense_product(rows, expand_block(values, block, shape), bias, relu, feature_major)
    else:
        y = _ops.masked_matmul(
            rows, values.contiguous(), bias, block, out_features, relu, feature_major
        )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def _takes_dense(method: str, x: Tensor, nnz: int, shape: tuple[int, int]) -> bool:
    if method == "auto":
        # On other devices the operator itself chooses.
        return x.device.type == "cpu" and dense_is_faster(x.shape[0], shape, nnz)
    if method not in ("sparse", "dense"):
        raise ValueError(f"argument 'method' must be 'auto', 'sparse' or 'dense', got {method!r}")
    return method == "dense"


def dense_is_faster(examples: int, shape: tuple[int, int], nnz: int) -> bool:
    """Whether expanding the weight and a dense product are expected to take less time (CPU).

    Measured: large batches break even at a density of one half; below 16 examples the dense
    product is bound by the memory that expanding writes and reads, and never wins.
    """
    return examples >= 16 and nnz > 0.5 * shape[0] * shape[1]


def _dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, feature_major: bool
) -> Tensor:
    if feature_major:
        y = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())
        return (torch.relu(y) if relu else y).t()
    y = torch.nn.functional.linear(x, weight, bias)
    return torch.relu(y) if relu else y


def expand_block(values: Tensor, block: Tensor, shape: tuple[int, int]) -> Tensor:
    """Do what :func:`expand` does, with a pattern given by its block and shape."""
    result: Tensor = _ops.expand(values.contiguous(), block, shape[0], shape[1])
    return result
