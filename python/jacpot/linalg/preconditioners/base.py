"""What a preconditioner is to a solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg.operator import FunctionOperator, LinearOperator

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
    """

    inverse: LinearOperator | None
    description: str


class Preconditioner:
    """Settings of a preconditioner; :meth:`prepare` does the work."""

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:
        """Make it for ``operator + damping·I``, symmetric positive (semi-)definite."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Preconditioner):
    """No preconditioning."""

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        return Prepared(None, "none")


class LowRankInverse(LinearOperator):
    """``damping · (F Fᵀ + damping·I)⁻¹ = I - F (Fᵀ F + damping·I)⁻¹ Fᵀ`` (Woodbury).

    Parameters
    ----------
    factor
        F (n, r).
    damping
        Raised where needed so that rounding in F's dtype cannot make the result indefinite; the
        approximation error outside F's range exceeds such damping anyway.
    """

    def __init__(self, factor: Tensor, damping: float) -> None:
        self.factor = factor
        self.shape, self.dtype = (factor.shape[0], factor.shape[0]), factor.dtype
        self.device = factor.device
        values, vectors = torch.linalg.eigh((factor.T @ factor).double())
        floor = 30 * torch.finfo(factor.dtype).eps * float(values[-1]) if len(values) else 0.0
        shifted = values.clamp_min(0) + max(damping, floor)
        self.middle = ((vectors / shifted) @ vectors.T).to(factor.dtype)

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.addmm(x, self.factor, self.middle @ (self.factor.T @ x), alpha=-1)

    def _adjoint(self) -> LinearOperator:
        return self


def elementwise_inverse(values: Tensor) -> LinearOperator:
    """``diag(1 / values)``."""
    n = values.shape[0]
    return FunctionOperator(
        (n, n), lambda x: x / values[:, None], dtype=values.dtype, device=values.device
    )
