"""The Jacobian of factored layers, formed in full, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(
    activations: Tensor, signals: Tensor, mask: Tensor | None = None, bias: bool = False
) -> Tensor:
    """Form ``J (N, K, P)``, kept columns only, then the bias.

    ``J[n,k,(g,o,i)] = Σ_t δ[n,k,t,g,o] a[n,t,g,i]`` with ``activations (N, T, G, I)``,
    ``signals (N, K, T, G, O)``, ``mask (G·O, I)`` bool.
    """
    block = torch.einsum("nktgo,ntgi->nkgoi", signals, activations).flatten(2)
    if mask is not None:
        block = block[:, :, mask.flatten()]
    if bias:
        block = torch.cat([block, signals.sum(2).flatten(2)], dim=2)
    return block


def gram(left: Tensor, right: Tensor, outputs: str = "full") -> Tensor:
    """Compute inner products of the rows of ``(N, K, P)`` and ``(M, K, P)``."""
    equation = {"full": "nkp,mlp->nkml", "trace": "nkp,mkp->nm", "diagonal": "nkp,mkp->nmk"}
    return torch.einsum(equation[outputs], left, right)


def jvp(jacobian: Tensor, vectors: Tensor) -> Tensor:
    """``(N, K, P)`` times ``(P,)`` or ``(P, R)``."""
    return torch.matmul(jacobian, vectors)


def vjp(jacobian: Tensor, u: Tensor) -> Tensor:
    """``(N, K, P)`` transposed times ``(N, K)`` or ``(N, K, R)``."""
    return torch.einsum("nkp,nk...->p...", jacobian, u)


def row_norms(jacobian: Tensor) -> Tensor:
    """``(N, K)``."""
    return jacobian.square().sum(2).sqrt()


def column_norms(jacobian: Tensor) -> Tensor:
    """``(P,)``."""
    return jacobian.square().sum((0, 1)).sqrt()
