"""One run of a solver on one system, in units that suit it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot._backend import core, threads
from jacpot.linalg import cuda
from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners import Cholesky, Preconditioner
from jacpot.linalg.prepare import prepare
from jacpot.linalg.solution import Status
from jacpot.linalg.system import AffineOperator, System

__all__ = ["Attempt", "Callback", "attempt", "iterate"]

Callback = Callable[[int, float, float], Any]


@dataclass
class Attempt:
    """What a solver made of ``(A + damping·I) / unit · x = columns``; see `iterate`.

    Attributes
    ----------
    system, unit, columns
        The system in that unit, and its right-hand sides (n, R).
    x
        (n, R).
    result
        What `iterate` gave.
    description
        Of the preconditioner.
    setup_seconds
        That preparing it took.
    """

    system: System
    unit: float
    columns: Tensor
    x: Tensor
    result: dict[str, Any]
    description: str
    setup_seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether it was by Ctrl-C, before the last recomputation of the residual."""
        return "residual_norms" not in self.result

    def judge(self, scales: list[float], scale: Tensor, tol: float) -> tuple[Status, list[float]]:
        """Give the status and the residuals' norms of x, which is in the caller's units by now.

        That changed nothing but where it left the range of float64, or came near its end.
        """
        status = Status(self.result["outcome"])
        if not self.interrupted and all(
            size == 0 or 1e-250 < size * (factor / self.unit) < 1e300
            for size, factor in zip(self.result["largest"], scales, strict=True)
        ):
            return status, self.result["residual_norms"]
        norms: list[float] = self.system.residual_norms(
            self.columns, self.x / scale * self.unit
        ).tolist()
        if status is Status.converged:
            reached = self.result["residual_norms"], self.result["rhs_norms"]
            if not all(map(math.isfinite, norms)):
                status = Status.non_finite
            elif any(now > r + tol * of_b for now, r, of_b in zip(norms, *reached, strict=True)):
                status = Status.stagnated
        return status, norms


def attempt(
    system: System,
    unit: float,
    columns: Tensor,
    guess: Tensor | None,
    method: str,
    preconditioner: Any,
    tol: float,
    limit: int,
    callback: Callback | None,
) -> Attempt:
    """Solve ``system`` over ``unit``, from ``guess`` on if there is one; see `jacpot.solve`."""
    start = time.perf_counter()
    scaled = system.over(unit)
    a, damping = scaled.a, scaled.damping
    if method == "lsmr" and not scaled.stacked and damping:
        a, damping = AffineOperator(a, shift=damping), 0.0
    if method == "cholesky":
        preconditioner = Cholesky()
    target = a._normal() if method == "lsmr" and preconditioner is not None else a
    prepared = prepare(preconditioner, target, damping)
    inverse = prepared.inverse
    if unit != 1 and inverse is not None and not isinstance(preconditioner, (str, Preconditioner)):
        # It is the caller's own, for the system in the caller's units.
        for _ in range(2 if method == "lsmr" else 1):
            inverse = AffineOperator(inverse, unit)
    setup = 0.0 if preconditioner is None else time.perf_counter() - start
    x = columns.new_zeros(a.shape[1], columns.shape[1])
    if guess is not None:
        torch.mul(guess, unit, out=x)
    name = "cg" if method == "cholesky" else method
    result = iterate(name, a, columns, x, damping, inverse, tol, limit, callback)
    return Attempt(scaled, unit, columns, x, result, prepared.description, setup)


def iterate(
    method: str,
    a: LinearOperator,
    columns: Tensor,
    x: Tensor,
    damping: float,
    inverse: LinearOperator | None,
    tol: float,
    max_iter: int,
    callback: Callback | None,
) -> dict[str, Any]:
    """Improve ``x`` (n, R) in place, on the device it is on, and say what happened.

    Returns
    -------
    dict
        ``outcome``, ``iterations``, ``history``; for each column ``rhs_norms``, ``largest``, the
        size of an element of x, and ``residual_norms``, recomputed; ``products``. The last two are
        missing after Ctrl-C.
    """
    if _backend.on_cuda(x):
        return cuda.iterate(method, a, columns, x, damping, inverse, tol, max_iter, callback)
    core_inverse: Any = None if inverse is None else inverse._core()
    result: dict[str, Any] = core.krylov_solve(
        method,
        a._core(),
        columns.numpy(),
        x.numpy(),
        damping,
        core_inverse,
        tol,
        max_iter,
        threads(),
        callback,
    )
    return result
