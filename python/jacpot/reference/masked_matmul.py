"""The product with a masked weight, by way of the dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compress", "expand", "masked_matmul", "masked_matmul_backward"]


def compress(weight: Tensor, mask: Tensor) -> Tensor:
    """Kept entries of ``weight``, row by row."""
    return weight[mask]


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of :func:`compress` back in place, with zeros between them."""
    weight = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return weight.masked_scatter(mask, values)


def masked_matmul(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ expand(values).T + bias``; x (..., in), mask (out, in)."""
    y = x @ expand(values, mask).T
    return y if bias is None else y + bias


def masked_matmul_backward(
    dy: Tensor, x: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`masked_matmul` with regard to x (N, in) and values (nnz,)."""
    return dy @ expand(values, mask), (dy.T @ x)[mask]
