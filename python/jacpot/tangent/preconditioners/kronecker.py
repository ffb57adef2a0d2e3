"""Kronecker factors for the primal: K-FAC's approximation of ``Jᵀ J``, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg import LinearOperator
from jacpot.linalg.preconditioners import Preconditioner, Prepared
from jacpot.ops.jacobian import Block, Factors, column_norms
from jacpot.tangent.operators import GaussNewtonOperator

__all__ = ["Kronecker"]


@dataclass(frozen=True)
class Kronecker(Preconditioner):
    """``Σ_n (a aᵀ) ⊗ (δ δᵀ)`` of a layer by ``(Σ a aᵀ) ⊗ (Σ δ δᵀ) / (number of terms)``.

    Martens & Grosse 2015; the damped product is inverted exactly in the factors' eigenbases. The
    bias is one more activation of one. Blocks that are masked, grouped or not factored get their
    diagonal.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.tangent.preconditioners import Kronecker
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    >>> x, y = torch.randn(200, 4), torch.randn(200, 3)
    >>> options = {"ridge": 0.1, "method": "primal", "preconditioner": Kronecker()}
    >>> jacpot.linearize(net).fit(x, y, **options).preconditioner
    'kronecker(2 of 2 blocks)'
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:
        """Make it for a `GaussNewtonOperator` with a ridge above zero."""
        if not isinstance(operator, GaussNewtonOperator):
            raise TypeError(
                "argument 'preconditioner': the Kronecker one needs the primal's matrix, got "
                f"{type(operator).__name__}"
            )
        if 0 in operator.jacobian.shape or damping <= 0:
            return Prepared(None, "none")
        parts = [_inverse(block, damping) for block in operator.jacobian.blocks]
        factored = sum(isinstance(part, _Layer) for part in parts)
        text = f"kronecker({factored} of {len(parts)} blocks)"
        return Prepared(_BlockDiagonal(parts, operator), text)


class _Layer:
    def __init__(self, block: Factors, damping: float) -> None:
        n, k, t = block.n_examples, block.n_outputs, block.n_positions
        a = block.activations.reshape(n * t, -1)
        if block.bias:
            a = torch.cat([a, a.new_ones(n * t, 1)], dim=1)
        s = block.signals.reshape(n * k * t, -1)
        self.bias, self.damping = block.bias, damping
        in_values, self.inner = _eigen(a)
        out_values, self.outer = torch.linalg.eigh(s.T @ s)
        product = out_values.clamp_min(0)[:, None] * in_values.clamp_min(0) / (n * t)
        self.divisor = product + damping
        self.shape = (len(out_values), a.shape[1])

    def solve(self, x: Tensor) -> Tensor:
        o, i = self.shape
        weights = o * (i - 1) if self.bias else o * i
        matrix = x[:weights].T.reshape(x.shape[1], o, -1)
        if self.bias:
            matrix = torch.cat([matrix, x[weights:].T[:, :, None]], dim=2)
        inner = matrix @ self.inner
        solved = self.outer @ ((self.outer.T @ inner) / self.divisor)
        if self.inner.shape[1] < i:  # outside of the activations' span there is the damping alone
            matrix = torch.baddbmm(
                matrix, solved - inner / self.damping, self.inner.T.expand(len(x.T), -1, -1),
                beta=1 / self.damping,
            )  # fmt: skip
        else:
            matrix = solved @ self.inner.T
        if not self.bias:
            result: Tensor = matrix.flatten(1)
        else:
            result = torch.cat([matrix[:, :, :-1].flatten(1), matrix[:, :, -1]], dim=1)
        return result.T


def _eigen(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of ``AᵀA`` for A (m, n); of few rows, only of its span."""
    m, n = rows.shape
    if 2 * m > n:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return values, vectors
    # From A Aᵀ, in float64: the vectors' errors grow with the spread of the values.
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = values > max(torch.finfo(rows.dtype).eps, 1e-10) * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values.to(rows.dtype), (wide.T @ (vectors / values.sqrt())).to(rows.dtype)


class _Diagonal:
    def __init__(self, block: Block, damping: float) -> None:
        self.divisor = column_norms([block]).square()[:, None] + damping

    def solve(self, x: Tensor) -> Tensor:
        result: Tensor = x / self.divisor
        return result


def _inverse(block: Block, damping: float) -> _Layer | _Diagonal:
    if isinstance(block, Factors) and block.pattern is None and block.shape[0] == 1:
        return _Layer(block, damping)
    return _Diagonal(block, damping)


class _BlockDiagonal(LinearOperator):
    def __init__(self, parts: list[_Layer | _Diagonal], matrix: GaussNewtonOperator) -> None:
        self.parts, self.sizes = parts, matrix.jacobian.sizes
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def _matmat(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.sizes)
        return torch.cat([part.solve(p) for part, p in zip(self.parts, pieces, strict=True)])

    def _adjoint(self) -> LinearOperator:
        return self
