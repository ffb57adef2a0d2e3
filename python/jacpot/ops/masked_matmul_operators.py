"""The sparse product as PyTorch operators: kernels, derivatives, transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import jacpot.ops.masked_matmul_cuda  # noqa: F401 - registers the CUDA side of the operators
from jacpot import _backend
from jacpot.ops.bilinear import Bilinear
from jacpot.ops.linear import Linear

__all__ = ["compress", "expand", "multiply"]

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
        values.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
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
        values.detach().contiguous(),
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
    _backend.core.expand(pattern, values.detach().contiguous(), weight, _backend.threads())
    return weight


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
# How the result lies in memory is free to choose: gradients take rows.
multiply = Bilinear(_library, "masked_matmul", _forward_cpu, _backward_cpu, plain=False)
compress, expand = Linear(_library, "compress"), Linear(_library, "expand")
compress.transpose, expand.transpose = expand, compress
