"""A Cholesky factor of the whole matrix: with refinement, a direct method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners.base import Preconditioner, Prepared
from jacpot.linalg.scaling import power_of_two

__all__ = ["Cholesky"]

PANEL = 64  # rows


@dataclass(frozen=True)
class Cholesky(Preconditioner):
    """``(L Lᵀ)⁻¹`` of ``A + damping·I``, factored in float32 and in float64 only if that fails.

    With it conjugate gradients are iterative refinement that also converges where the float32
    factor is a poor inverse: a few iterations of n² work after n³/3 at float32 speed. Preparing it
    waits for a GPU once for each factor, to learn whether it exists; applying it never does.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg.preconditioners import Cholesky
    >>> A = torch.diag(torch.logspace(-3, 3, 50, dtype=torch.float64))
    >>> b = torch.ones(50, dtype=torch.float64)
    >>> solution = jacpot.solve(A, b, method="cg", preconditioner=Cholesky())
    >>> solution.preconditioner, solution.iterations < 5
    ('cholesky(float32)', True)
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        if operator.shape[0] == 0:
            return Prepared(None, "none")
        matrix = operator.dense()
        largest = matrix.diagonal().abs().max().double()
        for dtype in (torch.float32, torch.float64):
            # Scaled to a diagonal near one, so that float32 neither over- nor underflows.
            scaled = torch.empty_like(matrix, dtype=dtype)
            for i in range(0, len(matrix), PANEL):  # in pieces that stay in cache
                scaled[i : i + PANEL] = matrix[i : i + PANEL] / largest
            scaled.diagonal().add_(damping / largest)
            factor, info = torch.linalg.cholesky_ex(scaled)
            scale, failed = torch.stack([largest, info.double()]).tolist()  # the only wait
            if not 0 < scale < float("inf"):
                return Prepared(None, "none (the diagonal is zero or not finite)")
            if not failed:
                name = str(dtype).removeprefix("torch.")
                return Prepared(_Solve(factor, scale), f"cholesky({name})")
        return Prepared(None, "none (not positive definite to rounding)")


class _Solve(LinearOperator):
    def __init__(self, factor: Tensor, scale: float) -> None:
        self.factor, self.scale = factor, scale
        self.shape, self.dtype = (factor.shape[0], factor.shape[0]), torch.float64
        self.device = factor.device

    def _matmat(self, x: Tensor) -> Tensor:
        # A power of two for each column keeps float32 in range.
        size = power_of_two(x)
        narrow = (x / size).to(self.factor.dtype)
        # Not cholesky_solve, which copies the factor each time.
        half = torch.linalg.solve_triangular(self.factor, narrow, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return whole.double() * (size / self.scale)

    def _adjoint(self) -> LinearOperator:
        return self
