"""An operator and its damping: what the system is, how large, and the same in other units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg.operator import DenseOperator, LinearOperator
from jacpot.linalg.scaling import power_of_two_above

__all__ = ["EXTREME", "AffineOperator", "System", "shifted"]

EXTREME = 2.0**100  # sizes that far from one are brought near it: squares stay in range


def shifted(a: LinearOperator) -> bool:
    """Tell whether damping is added to the diagonal, or else to the normal equations."""
    return a.shape[0] == a.shape[1] and not a.least_squares


class AffineOperator(LinearOperator):
    """``factor·A + shift·I``, by products with A.

    Parameters
    ----------
    operator
        A, square where there is a shift.
    factor
        A power of two, to be exact.
    shift
        Added to the diagonal.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import DenseOperator
    >>> from jacpot.linalg.system import AffineOperator
    >>> AffineOperator(DenseOperator(torch.eye(2)), 2.0, shift=1.0) @ torch.ones(2)
    tensor([3., 3.])
    """

    def __init__(self, operator: LinearOperator, factor: float = 1.0, shift: float = 0.0) -> None:
        self.operator, self.factor, self.shift = operator, factor, shift
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.column_group, self.replayable = operator.column_group, operator.replayable
        self.least_squares = operator.least_squares

    def _matmat(self, x: Tensor) -> Tensor:
        # In float64, whose range the factor needs.
        product = self.operator._matmat(x).double() * self.factor
        return product.add(x, alpha=self.shift).to(self.dtype) if self.shift else product.to(x)

    def _adjoint(self) -> LinearOperator:
        return AffineOperator(self.operator.T, self.factor, self.shift)

    def _double(self) -> LinearOperator:
        return AffineOperator(self.operator.double(), self.factor, self.shift)


@dataclass(frozen=True)
class System:
    """``(A + damping·I) x = b``, or with ``stacked`` damping ``min ‖A x − b‖² + damping·‖x‖²``."""

    a: LinearOperator
    damping: float
    stacked: bool

    def over(self, unit: float) -> System:
        """Divide the operator by a power of two, the damping accordingly."""
        if unit == 1:
            return self
        a = self.a
        if isinstance(a, DenseOperator):
            scaled: LinearOperator = DenseOperator((a.matrix.double() / unit).to(a.dtype))
            scaled.symmetric = a.symmetric  # type: ignore[attr-defined]
        else:
            scaled = AffineOperator(a, 1 / unit)
        damping = self.damping / unit
        return System(scaled, damping / unit if self.stacked else damping, self.stacked)

    def unit(self) -> float:
        """Give a power of two near the largest element, of one product at least; 1 if usual."""
        a = self.a
        if isinstance(a, DenseOperator):
            seen = a.matrix
        else:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(a.shape[1], 1, generator=generator, dtype=torch.float64, device="cpu")
            seen = a.double()._matmat(x.to(a.device, a.double().dtype))
        size = float(seen.abs().max()) if seen.numel() else 0.0
        size = max(size, self.damping**0.5 if self.stacked else self.damping)
        if not 0 < size < math.inf or 1 / EXTREME < size < EXTREME:
            return 1.0
        return power_of_two_above(size)

    def residual_norms(self, b: Tensor, x: Tensor) -> Tensor:
        """Recompute the norms (R,) of the residuals in float64."""
        exact = self.a.double()
        residual = b - exact._matmat(x.to(exact.dtype)).double()
        if self.stacked:
            return torch.hypot(residual.norm(dim=0), self.damping**0.5 * x.norm(dim=0))
        norms: Tensor = residual.sub(x, alpha=self.damping).norm(dim=0)
        return norms
