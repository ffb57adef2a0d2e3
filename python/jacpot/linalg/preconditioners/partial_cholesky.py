"""Random-pivoted partial Cholesky."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners.base import LowRankInverse, Preconditioner, Prepared

__all__ = ["PartialCholesky"]


@dataclass(frozen=True)
class PartialCholesky(Preconditioner):
    """``A ≈ F Fᵀ`` with pivots drawn in proportion to the diagonal that is left.

    Chen, Epperly, Tropp & Webber 2023, "Randomly pivoted Cholesky"; pivots are drawn in blocks.
    It looks harder for good columns than `Nystrom` and pays where rows differ much in weight.

    Parameters
    ----------
    rank
        Number of pivots.
    block
        Pivots drawn at a time.
    seed
        Of the draw.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg.preconditioners import PartialCholesky
    >>> points = torch.linspace(0, 1, 200, dtype=torch.float64)
    >>> A, b = torch.exp(-(points[:, None] - points).square()), torch.sin(9 * points)
    >>> plain = jacpot.solve(A, b, 1e-3, method="cg")
    >>> helped = jacpot.solve(A, b, 1e-3, method="cg", preconditioner=PartialCholesky(rank=20))
    >>> helped.preconditioner.split("(")[0], helped.iterations < plain.iterations
    ('partial_cholesky', True)
    """

    rank: int = 500
    block: int = 100
    seed: int = 0

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:  # noqa: D102
        if operator.shape[0] == 0 or damping <= 0:
            return Prepared(None, "none (partial Cholesky needs damping)")
        factor = random_pivoted_cholesky(operator, self.rank, self.block, self.seed)
        text = f"partial_cholesky(rank={factor.shape[1]})"
        return Prepared(LowRankInverse(factor.to(operator.dtype).T.contiguous(), damping), text)


def random_pivoted_cholesky(
    operator: LinearOperator, rank: int, block: int, seed: int = 0
) -> Tensor:
    """Give F (n, r) float64 with ``A ≈ F Fᵀ``; r is less than ``rank`` when A is exhausted."""
    n = operator.shape[0]
    generator = torch.Generator().manual_seed(seed)
    left = operator.diagonal().double().clamp_min(0)
    factor = torch.zeros(n, 0, dtype=torch.float64, device=left.device)
    floor = 1e-13 * float(left.max()) if n else 0.0
    while factor.shape[1] < min(rank, n):
        weights = torch.where(left > floor, left, 0.0)
        candidates = int((weights > 0).sum())
        if candidates == 0:
            break
        count = min(block, rank - factor.shape[1], candidates)
        # Drawn on the CPU, so that the pivots are the same on every device.
        drawn = torch.multinomial(weights.cpu(), count, replacement=False, generator=generator)
        pivots = drawn.to(left.device)
        columns = operator.columns(pivots).double() - factor @ factor[pivots].T
        values, vectors = torch.linalg.eigh(columns[pivots])
        keep = values > 1e-10 * values[-1].clamp_min(floor)
        if not keep.any():
            break
        new = columns @ (vectors[:, keep] / values[keep].sqrt())
        factor = torch.cat([factor, new], dim=1)
        left = (left - new.square().sum(1)).clamp_min(0)
        left[pivots] = 0
    return factor
