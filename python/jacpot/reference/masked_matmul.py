"""The product with a masked weight, by way of the dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compress", "expand", "masked_matmul", "masked_matmul_backward"]


def compress(weight: Tensor, mask: Tensor) -> Tensor:
    """Kept entries of a weight, row by row.

    Parameters
    ----------
    weight
        ``(out, in)``.
    mask
        ``(out, in)`` bool.

    Returns
    -------
    Tensor
        ``(nnz,)``.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> compress(weight, torch.tensor([[True, False], [True, True]]))
    tensor([1., 3., 4.])
    """
    return weight[mask]


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of :func:`compress` back in place, with zeros between them.

    Parameters
    ----------
    values
        ``(nnz,)``.
    mask
        ``(out, in)`` bool.

    Returns
    -------
    Tensor
        ``(out, in)``.

    Examples
    --------
    >>> expand(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [3., 4.]])
    """
    weight = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return weight.masked_scatter(mask, values)


def masked_matmul(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x · Wᵀ + bias`` for the weight that :func:`expand` makes.

    Parameters
    ----------
    x
        ``(..., in)``.
    values
        ``(nnz,)``.
    mask
        ``(out, in)`` bool.
    bias
        ``(out,)``.

    Returns
    -------
    Tensor
        ``(..., out)``.

    Examples
    --------
    >>> mask = torch.tensor([[True, False], [True, True]])
    >>> masked_matmul(torch.tensor([10.0, 1.0]), torch.tensor([1.0, 3.0, 4.0]), mask)
    tensor([10., 34.])
    """
    y = x @ expand(values, mask).T
    return y if bias is None else y + bias


def masked_matmul_backward(
    dy: Tensor, x: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`masked_matmul`.

    Parameters
    ----------
    dy
        ``(N, out)``, the gradient by the result.
    x
        ``(N, in)``.
    values
        ``(nnz,)``.
    mask
        ``(out, in)`` bool.

    Returns
    -------
    dx : Tensor
        ``(N, in)``.
    dvalues : Tensor
        ``(nnz,)``.

    Examples
    --------
    >>> mask = torch.tensor([[True, False], [True, True]])
    >>> x, values = torch.tensor([[10.0, 1.0]]), torch.tensor([1.0, 3.0, 4.0])
    >>> masked_matmul_backward(torch.tensor([[1.0, 1.0]]), x, values, mask)
    (tensor([[4., 4.]]), tensor([10., 10.,  1.]))
    """
    return dy @ expand(values, mask), (dy.T @ x)[mask]
