"""Restarts from the recomputed residual, the terms that all solvers on a GPU share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg.operator import DenseOperator, LinearOperator
from jacpot.linalg.solution import Status

__all__ = ["Solver", "exact_product", "over", "refine"]

PATIENCE = 3  # recomputed residuals in a row that are no smaller, before it counts as stagnated
PANEL_BYTES = 256 << 20  # of a float32 matrix that is widened at a time


class Solver:
    """A method, with what it is to solve and what it has done.

    A subclass implements :meth:`residual` and :meth:`descend`.

    Attributes
    ----------
    norms : Tensor
        Of the recomputed residual's columns, (R,), on the CPU.
    floor : float
        A restart pays once the recurred residual has fallen by this factor: beyond it, rounding in
        the products hides what is gained.
    """

    norms: Tensor

    def __init__(
        self,
        a: LinearOperator,
        b: Tensor,
        x: Tensor,
        damping: float,
        inverse: LinearOperator | None,
        tol: float,
        limit: int,
        callback: Callable[[int, float, float], Any] | None,
    ) -> None:
        self.a, self.b, self.x, self.damping = a, b, x, damping
        self.inverse, self.tol, self.limit, self.callback = inverse, tol, limit, callback
        self.norm_b = b.norm(dim=0).cpu()
        self.target = tol * self.norm_b
        self.floor = max(100 * torch.finfo(a.dtype).eps, 1e-13)
        self.iterations = self.products = 0
        self.history: list[float] = []
        self.began = time.perf_counter()

    def residual(self) -> bool:
        """Recompute the residual in float64, set `norms`, and tell whether x solves the system."""
        raise NotImplementedError

    def hopeless(self) -> Status | None:
        """Tell of the recomputed residual why nothing can make it smaller, where that is known."""
        return None

    def measure(self) -> float:
        """Give what a restart must make smaller."""
        return float(self.relative(self.norms).max()) if len(self.norms) else 0.0

    def descend(self) -> Status | None:
        """Iterate from the recomputed residual; None where a new one decides how it goes on."""
        raise NotImplementedError

    def relative(self, norms: Tensor) -> Tensor:
        """Of the right-hand sides' norms, (R,)."""
        return torch.where(norms > 0, norms / self.norm_b, torch.zeros_like(norms))

    def report(self, worst: float) -> Status | None:
        """Write down a relative residual, and ask the callback whether to go on."""
        self.history.append(worst)
        if self.callback is None:
            return None
        seconds = time.perf_counter() - self.began
        stop = self.callback(self.iterations, worst, seconds) is False
        return Status.interrupted if stop else None

    def multiply(self, x: Tensor) -> Tensor:
        """``A x`` in the operator's dtype, given and returned in float64."""
        self.products += 1
        return self.a._matmat(x.to(self.a.dtype)).double()

    def precondition(self, r: Tensor) -> Tensor:
        """``M⁻¹ r``."""
        if self.inverse is None:
            return r
        return self.inverse._matmat(r.to(self.inverse.dtype)).double().contiguous()


def exact_product(a: LinearOperator, x: Tensor) -> Tensor:
    """``A x`` in float64, without a float64 copy of a whole matrix."""
    if not isinstance(a, DenseOperator) or a.dtype == torch.float64:
        exact = a.double()
        return exact._matmat(x.to(exact.dtype)).double()
    matrix = a.matrix
    rows = max(1, PANEL_BYTES // max(1, matrix.shape[1] * 8))
    parts = [matrix[i : i + rows].double() @ x for i in range(0, max(1, len(matrix)), rows)]
    return torch.cat(parts)


def over(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, zero where a column is done and b is zero."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, 1.0, b))


def refine(solver: Solver) -> dict[str, Any]:
    """Restart a solver until its recomputed residual is small enough, or cannot become so."""
    interrupted = False
    try:
        status = _refine(solver)
    except KeyboardInterrupt:
        interrupted, status = True, Status.interrupted
    result = {
        "outcome": status.value,
        "iterations": solver.iterations,
        "history": solver.history,
        "rhs_norms": solver.norm_b.tolist(),
        "largest": solver.x.abs().amax(dim=0).tolist()
        if len(solver.x)
        else [0.0] * solver.x.shape[1],
    }
    if not interrupted:
        result.update(products=solver.products, residual_norms=solver.norms.tolist())
    return result


def _refine(solver: Solver) -> Status:
    best, idle = None, 0
    while True:
        solved = solver.residual()
        if not bool(solver.norms.isfinite().all()):
            return Status.non_finite
        if solved:
            return Status.converged
        if (status := solver.hopeless()) is not None:
            return status
        measure = solver.measure()
        idle = 0 if best is None or measure < 0.7 * best else idle + 1
        best = measure if best is None else min(best, measure)
        if idle >= PATIENCE:
            return Status.stagnated
        if solver.iterations >= solver.limit:
            return Status.iteration_limit
        status = solver.descend()
        if status is not None:
            solved = solver.residual()
            return Status.converged if solved and status is Status.interrupted else status
