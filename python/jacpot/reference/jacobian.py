"""The Jacobian of factored layers, formed in full, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["column_norms", "gram", "jvp", "row_norms", "rows", "vjp"]


def rows(
    activations: Tensor, signals: Tensor, mask: Tensor | None = None, bias: bool = False
) -> Tensor:
    """Form ``J[n,k,(g,o,i)] = Σ_t δ[n,k,t,g,o] a[n,t,g,i]``, kept columns only, then the bias.

    Parameters
    ----------
    activations
        a ``(N, T, G, I)``.
    signals
        δ ``(N, K, T, G, O)``.
    mask
        ``(G·O, I)`` bool; None keeps all.
    bias
        Whether the ``G·O`` columns of a bias follow.

    Returns
    -------
    Tensor
        ``(N, K, P)``.

    Examples
    --------
    >>> a, s = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> rows(a.reshape(1, 1, 1, 2), s.reshape(1, 1, 1, 1, 2), bias=True)
    tensor([[[3., 6., 4., 8., 3., 4.]]])
    """
    block = torch.einsum("nktgo,ntgi->nkgoi", signals, activations).flatten(2)
    if mask is not None:
        block = block[:, :, mask.flatten()]
    if bias:
        block = torch.cat([block, signals.sum(2).flatten(2)], dim=2)
    return block


def gram(left: Tensor, right: Tensor, outputs: str = "full") -> Tensor:
    """Inner products of the rows of two Jacobians.

    Parameters
    ----------
    left, right
        ``(N, K, P)`` and ``(M, K, P)``.
    outputs
        ``"full"``, ``"trace"`` (summed over equal outputs) or ``"diagonal"`` (equal outputs).

    Returns
    -------
    Tensor
        ``(N, K, M, K)``, ``(N, M)`` or ``(N, M, K)``.

    Examples
    --------
    >>> j = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    >>> gram(j, j).reshape(2, 2)
    tensor([[1., 1.],
            [1., 2.]])
    >>> gram(j, j, "trace")
    tensor([[3.]])
    """
    equation = {"full": "nkp,mlp->nkml", "trace": "nkp,mkp->nm", "diagonal": "nkp,mkp->nmk"}
    return torch.einsum(equation[outputs], left, right)


def jvp(jacobian: Tensor, vectors: Tensor) -> Tensor:
    """``J v``.

    Parameters
    ----------
    jacobian
        ``(N, K, P)``.
    vectors
        ``(P,)`` or ``(P, R)``.

    Returns
    -------
    Tensor
        ``(N, K)`` or ``(N, K, R)``.

    Examples
    --------
    >>> jvp(torch.ones(1, 2, 3), torch.ones(3))
    tensor([[3., 3.]])
    """
    return torch.matmul(jacobian, vectors)


def vjp(jacobian: Tensor, u: Tensor) -> Tensor:
    """``Jᵀ u``.

    Parameters
    ----------
    jacobian
        ``(N, K, P)``.
    u
        ``(N, K)`` or ``(N, K, R)``.

    Returns
    -------
    Tensor
        ``(P,)`` or ``(P, R)``.

    Examples
    --------
    >>> vjp(torch.ones(1, 2, 3), torch.ones(1, 2))
    tensor([2., 2., 2.])
    """
    return torch.einsum("nkp,nk...->p...", jacobian, u)


def row_norms(jacobian: Tensor) -> Tensor:
    """Euclidean norm of every row.

    Parameters
    ----------
    jacobian
        ``(N, K, P)``.

    Returns
    -------
    Tensor
        ``(N, K)``.

    Examples
    --------
    >>> row_norms(torch.tensor([[[3.0, 4.0]]]))
    tensor([[5.]])
    """
    return jacobian.square().sum(2).sqrt()


def column_norms(jacobian: Tensor) -> Tensor:
    """Euclidean norm of every column.

    Parameters
    ----------
    jacobian
        ``(N, K, P)``.

    Returns
    -------
    Tensor
        ``(P,)``.

    Examples
    --------
    >>> column_norms(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))
    tensor([5., 1.])
    """
    return jacobian.square().sum((0, 1)).sqrt()
