"""Jacobi: the inverse of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners.base import Preconditioner, Prepared, elementwise_inverse

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal(Preconditioner):
    """Divide by the diagonal of ``A + damping·I``.

    Cheap, and right for badly scaled rows; a kernel of near-constant diagonal gains nothing.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg.preconditioners import Diagonal
    >>> A = torch.diag(torch.logspace(-3, 3, 50, dtype=torch.float64))
    >>> b = torch.ones(50, dtype=torch.float64)
    >>> jacpot.solve(A, b, method="cg", preconditioner=Diagonal()).iterations
    1
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        diagonal = operator.diagonal().double() + damping
        # A zero on the diagonal of a semidefinite matrix is a zero row: any positive value serves.
        return Prepared(elementwise_inverse(torch.where(diagonal > 0, diagonal, 1.0)), "diagonal")
