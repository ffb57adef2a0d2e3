"""Nyström: a low-rank approximation from sampled columns, inverted with the damping."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners.base import LowRankInverse, Preconditioner, Prepared

__all__ = ["Nystrom"]

PILOT = 256  # columns that the spectrum is judged by
TOLERANCE = 1e-4  # the residual that iterations are estimated for


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """``A ≈ C W⁻¹ Cᵀ`` with columns C at random indices and W their intersection.

    Its damped inverse is as in Frangella, Tropp & Udell 2023, "Randomized Nyström preconditioning".
    Columns of a tangent kernel cost far less than products with a random matrix, so columns are
    sampled.

    Parameters
    ----------
    rank
        Number of columns. None adapts it: the spectrum of a pilot sample is extrapolated, and the
        rank with the least estimated time for setup and iterations is taken; where decay is so
        slow that no rank pays, the identity is.
    max_bytes
        What the factor may take.
    seed
        Of the sample.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg.preconditioners import Nystrom
    >>> points = torch.linspace(0, 1, 200, dtype=torch.float64)
    >>> A, b = torch.exp(-(points[:, None] - points).square()), torch.sin(9 * points)
    >>> plain = jacpot.solve(A, b, 1e-3, method="cg")
    >>> helped = jacpot.solve(A, b, 1e-3, method="cg", preconditioner=Nystrom(rank=20))
    >>> helped.preconditioner.split("(")[0], helped.iterations < plain.iterations
    ('nystrom', True)
    """

    rank: int | None = None
    max_bytes: int = 4 << 30
    seed: int = 0

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        n, group = operator.shape[0], operator.column_group
        if n == 0 or damping <= 0:
            return Prepared(None, "none (nystrom needs damping)" if n else "none")
        limit = min(n // 2, self.max_bytes // (n * operator.dtype.itemsize))
        why = ""
        rank = self.rank
        if rank is None:
            rank, why = self._choose_rank(operator, damping, limit)
        rank = min(rank, n)
        if rank < group:
            return Prepared(None, f"none ({why or 'nystrom of rank 0'})")
        rows = self.factor(operator, rank)
        text = f"nystrom(rank={len(rows)}{', ' if why else ''}{why})"
        return Prepared(LowRankInverse(rows, damping), text)

    def factor(self, operator: LinearOperator, rank: int) -> Tensor:
        """Give Fᵀ (r, n), ``F Fᵀ ≈ A``, from ``rank`` columns."""
        n, group = operator.shape[0], operator.column_group
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n // group, generator=generator, device="cpu").to(operator.device)
        return nystrom_factor(operator, _indices(order, min(rank, n), group))

    def _choose_rank(self, operator: LinearOperator, damping: float, limit: int) -> tuple[int, str]:
        n, group = operator.shape[0], operator.column_group
        pilot = min(PILOT, limit)
        if pilot < group:
            return 0, "the matrix is too small"
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n // group, generator=generator, device="cpu").to(operator.device)
        indices = _indices(order, pilot, group)
        start = time.perf_counter()
        columns = operator.columns(indices)
        per_column = (time.perf_counter() - start) / len(indices)
        start = time.perf_counter()
        operator @ torch.ones(n, dtype=operator.dtype, device=operator.device)
        product = time.perf_counter() - start
        # Eigenvalues of the intersection, scaled up, estimate the matrix's own; a power law
        # through their middle extends them past the pilot (their end is biased downwards).
        values = torch.linalg.eigvalsh(columns[indices].double()).flip(0).clamp_min(0) * (
            n / len(indices)
        )
        low, high = len(values) // 8, len(values) // 2
        if values[0] <= damping or high <= low or values[high] <= 0:
            return 0, "the damping is above the spectrum"
        decay = math.log(values[low] / values[high]) / math.log((high + 1) / (low + 1))
        best_rank, best_time = 0, math.inf
        flops, traffic = 6e10 * torch.get_num_threads(), 2e10
        candidates = [round(group * 2 ** (i / 2)) // group * group for i in range(40)]
        for rank in [0, *candidates]:
            if rank > limit:
                break
            tail = (
                float(values[0])
                if rank == 0
                else float(values[high]) * ((high + 1) / rank) ** decay
            )
            iterations = 0.5 * math.sqrt(1 + tail / damping) * math.log(2 / TOLERANCE) + 2
            setup = rank * per_column + (2.0 * n * rank**2 + rank**3) / flops
            apply = 2 * n * rank * operator.dtype.itemsize / traffic
            total = setup + iterations * (product + apply)
            if total < best_time:
                best_rank, best_time = rank, total
        return best_rank, f"chosen by estimated time, {best_time:.2g} s"


def _indices(order: Tensor, rank: int, group: int) -> Tensor:
    blocks = order[: max(1, rank // group)]
    return (blocks[:, None] * group + torch.arange(group, device=order.device)).reshape(-1)


def nystrom_factor(operator: LinearOperator, indices: Tensor) -> Tensor:
    """Give Fᵀ (r, n) with ``F Fᵀ = C W⁻¹ Cᵀ``; r is zero where the columns are."""
    rows = operator.columns(indices).T.contiguous()
    small = rows[:, indices].double()
    small = (small + small.T) / 2
    # What of W is below the rounding of the columns is shifted out of the way.
    shift = 10 * torch.finfo(rows.dtype).eps * float(torch.linalg.matrix_norm(small))
    if not 0 < shift < math.inf:
        return rows[:0]
    while True:
        small.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(small)
        if int(info) == 0:
            # On columns, as the library keeps matrices: the rows of its result are contiguous.
            upper = lower.T.to(rows.dtype)
            solved = torch.linalg.solve_triangular(upper, rows.T, upper=True, left=False)
            factor: Tensor = solved.T.contiguous()
            return factor
        shift *= 10
