"""What a preconditioner is to a solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot._backend import threads
from jacpot.linalg.operator import FunctionOperator, LinearOperator
from jacpot.ops.jacobian_kernels import kernels

__all__ = ["Identity", "LowRankInverse", "Preconditioner", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A preconditioner made for one operator.

    Attributes
    ----------
    inverse : LinearOperator or None
        Approximates the inverse of ``A + damping·I``; symmetric positive definite. None is the
        identity.
    description : str
        Name and size, and the reason where there was a choice.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import DenseOperator
    >>> from jacpot.linalg.preconditioners import Diagonal
    >>> matrix = DenseOperator(torch.tensor([[1.0, 0.5], [0.5, 4.0]]))
    >>> prepared = Diagonal().prepare(matrix, damping=0.0)
    >>> prepared.description
    'diagonal'
    >>> prepared.inverse @ torch.ones(2)
    tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    inverse: LinearOperator | None
    description: str


class Preconditioner:
    """Settings of a preconditioner; :meth:`prepare` does the work.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg import FunctionOperator
    >>> from jacpot.linalg.preconditioners import Preconditioner, Prepared
    >>> class Halving(Preconditioner):
    ...     def prepare(self, operator, damping):
    ...         return Prepared(FunctionOperator(operator.shape, lambda x: x / 2), "halving")
    >>> solution = jacpot.solve(2 * torch.eye(3), torch.ones(3), method="cg",
    ...                         preconditioner=Halving())
    >>> solution.converged, solution.preconditioner
    (True, 'halving')
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:
        """Make it for ``operator + damping·I``, symmetric positive (semi-)definite."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Preconditioner):
    """No preconditioning.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg.preconditioners import Identity
    >>> jacpot.solve(torch.eye(2), torch.ones(2), method="cg", preconditioner=Identity()).x
    tensor([1., 1.], dtype=torch.float64)
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        return Prepared(None, "none")


class LowRankInverse(LinearOperator):
    """``damping · (F Fᵀ + damping·I)⁻¹ = I - F (Fᵀ F + damping·I)⁻¹ Fᵀ`` (Woodbury).

    Parameters
    ----------
    rows
        Fᵀ (r, n), contiguous: both products with F then stream through memory.
    damping
        Raised where needed so that rounding in F's dtype cannot make the result indefinite; the
        approximation error outside F's range exceeds such damping anyway.
    """

    replayable = True

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.rows = rows
        self.shape, self.dtype = (rows.shape[1], rows.shape[1]), rows.dtype
        self.device = rows.device
        self.middle = rows.new_zeros(0, 0)
        if len(rows):
            inner = inner_products(rows).double()
            floor = 30 * torch.finfo(rows.dtype).eps * float(torch.linalg.matrix_norm(inner))
            inner.diagonal().add_(max(damping, floor))
            self.middle = torch.cholesky_inverse(torch.linalg.cholesky(inner)).to(rows.dtype)

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.addmm(x, self.rows.T, self.middle @ (self.rows @ x), alpha=-1)

    def _adjoint(self) -> LinearOperator:
        return self


def inner_products(rows: Tensor) -> Tensor:
    """``rows · rowsᵀ`` (r, r), of which only half is computed."""
    out = rows.new_zeros(len(rows), len(rows))
    compiled = kernels(out)
    compiled.jacobian_add_row_products(rows, None, out, threads())
    compiled.jacobian_mirror(out, threads())
    return out


def elementwise_inverse(values: Tensor) -> LinearOperator:
    """``diag(1 / values)``."""
    n = values.shape[0]
    inverse = FunctionOperator(
        (n, n), lambda x: x / values[:, None], dtype=values.dtype, device=values.device
    )
    inverse.replayable = True
    return inverse
