"""The squared loss: ``min ½‖J Δ − r‖² + ridge/2 ‖Δ‖²`` in the smaller of two spaces.

Dual, ``(J Jᵀ + ridge·I) α = r``, ``Δ = Jᵀ α``; primal, ``(Jᵀ J + ridge·I) Δ = Jᵀ r``. Without a
ridge: the least-squares solution of least norm.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg import Interrupted, Solution, Status, solve
from jacpot.linalg.arguments import check_limits
from jacpot.linalg.preconditioners import Identity
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator, KernelOperator
from jacpot.tangent.preconditioners import Auto

__all__ = ["METHODS", "fit_squared"]

METHODS = ("auto", "dual", "primal", "lsmr", "svd")

# J of at most this many elements is written out for the least-norm solution: the singular value
# decomposition is exact, and takes seconds at most.
DENSE_ELEMENTS = 4_000_000


def fit_squared(
    jacobian: JacobianOperator,
    residual: Tensor,
    ridge: float,
    method: str = "auto",
    preconditioner: Any = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    callback: Callable[[int, float, float], Any] | None = None,
    start: Tensor | None = None,
) -> Solution:
    """Solve for Δ.

    Parameters
    ----------
    jacobian
        J (N·K, P).
    residual
        r (N, K), targets minus outputs at the expansion point.
    ridge
        Non-negative; zero asks for the least norm.
    method
        One of `METHODS`.
    preconditioner
        As in :func:`jacpot.solve`, or an object of `jacpot.tangent.preconditioners`. With
        ``"lsmr"`` only where there is a ridge, and not with ``"svd"``.
    start
        First Δ (P,), or None.
    tol, max_iter, callback
        As in :func:`jacpot.solve`.

    Returns
    -------
    Solution
        ``x`` is Δ (P,) in float64; ``details["dual"]`` is α (N·K,) where the dual was solved.
    """
    check_limits(tol, max_iter)
    automatic = preconditioner is None or isinstance(preconditioner, Auto | Identity)
    r = residual.double().reshape(-1)
    method = _choose(method, jacobian, ridge)
    options: dict[str, Any] = {"tol": tol, "max_iter": max_iter, "callback": callback}
    if not automatic and (method == "svd" or (method == "lsmr" and ridge == 0)):
        why = "is direct" if method == "svd" else "gives the least norm only without one"
        raise ValueError(f"argument 'preconditioner' must be 'auto' here: method {method!r} {why}")
    if method == "svd":
        return _least_norm(jacobian, r, ridge, tol)
    if method == "lsmr":
        if not automatic:
            options["preconditioner"] = preconditioner
        return solve(jacobian, r, damping=ridge, method="lsmr", x0=start, **options)
    options["preconditioner"] = preconditioner
    if method == "primal":
        rhs = jacobian.double().T @ r
        matrix = GaussNewtonOperator(jacobian)
        return solve(matrix, rhs, damping=ridge, method="cg", x0=start, **options)
    if start is not None:
        # At the solution α = (r - J Δ) / ridge.
        start = (r - jacobian.double() @ start) / ridge
    kernel = KernelOperator(jacobian)
    try:
        solution = solve(kernel, r, damping=ridge, method="cg", x0=start, **options)
    except Interrupted as stop:
        raise Interrupted(_from_dual(jacobian, stop.solution)) from None
    return _from_dual(jacobian, solution)


def _from_dual(jacobian: JacobianOperator, solution: Solution) -> Solution:
    alpha = solution.x
    details = {**solution.details, "dual": alpha}
    return dataclasses.replace(solution, x=jacobian.double().T @ alpha, details=details)


def _choose(method: str, jacobian: JacobianOperator, ridge: float) -> str:
    if method not in METHODS:
        raise ValueError(f"argument 'method' must be one of {METHODS}, got {method!r}")
    rows, columns = jacobian.shape
    if method != "auto":
        if ridge == 0 and method in ("dual", "primal"):
            raise ValueError(
                f"argument 'method': {method!r} needs a ridge above 0, got 0; use 'lsmr' or 'svd'"
            )
        return method
    if ridge == 0:
        return "svd" if rows * columns <= DENSE_ELEMENTS else "lsmr"
    return "primal" if columns < rows else "dual"


def _least_norm(jacobian: JacobianOperator, r: Tensor, ridge: float, tol: float) -> Solution:
    start = time.perf_counter()
    dense = jacobian.double().dense()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    # Without a ridge, what is no more than the rounding of J's own dtype counts as zero.
    largest = float(values[0]) if len(values) else 0.0
    noise = torch.finfo(jacobian.dtype).eps * max(dense.shape) * largest if ridge == 0 else 0.0
    factors = torch.where(values > noise, values / (values.square() + ridge), 0.0)
    x = right.T @ (factors * (left.T @ r))
    error = r - dense @ x
    normal = float((dense.T @ error - ridge * x).norm())
    size = float(error.norm())
    norm_r = float(r.norm())
    met = size <= tol * norm_r or normal <= tol * largest * max(size, ridge**0.5 * float(x.norm()))
    finite = bool(torch.isfinite(x).all())
    return Solution(
        x=x,
        status=Status.converged if met else Status.stagnated if finite else Status.non_finite,
        iterations=1,
        residual_norm=size,
        relative_residual=size / norm_r if norm_r else 0.0,
        method="svd",
        seconds=time.perf_counter() - start,
    )
