"""Convex losses: damped Newton steps, each one ridge system of a rescaled Jacobian.

Minimise ``L(Δ) = Σ_n ℓ_n(f0 + J Δ) + ridge/2 ‖Δ‖²``. With the Hessian of ℓ as ``S Sᵀ`` and
``J̃ = Sᵀ J``, which has the same factors as J with mixed signals, Newton's step d solves

    (J̃ᵀ J̃ + ridge·I) d = -∇L

in the primal, and in the dual, with ``(J̃ J̃ᵀ + ridge·I) p = -J̃ ∇L``, it is
``d = -(∇L + J̃ᵀ p) / ridge``. Both are symmetric positive definite whatever S is: a saturated
softmax gives rows near zero, not an inverse of zero.
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
from jacpot.linalg.prepare import prepare
from jacpot.tangent.losses import Loss
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator, KernelOperator

__all__ = ["fit_convex", "newton_direction"]

METHODS = ("auto", "dual", "primal")

# Armijo's constant, and the Newton decrement that counts as no decrease possible.
SUFFICIENT = 1e-4


def newton_direction(
    jacobian: JacobianOperator,
    root: Tensor,
    gradient: Tensor,
    ridge: float,
    tol: float,
    preconditioner: Any = None,
    method: str = "auto",
    max_iter: int | None = None,
    precise: bool = True,
) -> Solution:
    """Solve for Newton's step; its ``x`` is d (P,) in float64.

    Parameters
    ----------
    jacobian
        J (N·K, P).
    root
        S (N, K, K) of the loss's Hessian at the current outputs.
    gradient
        ∇L (P,) in float64.
    ridge
        Above zero.
    tol, preconditioner, max_iter
        As in :func:`jacpot.solve`.
    method
        ``"dual"``, ``"primal"`` or ``"auto"``.
    precise
        Judge the dual's step with products in float64.
    """
    scaled = jacobian.mixed(root)
    rows, columns = scaled.shape
    options: dict[str, Any] = {"tol": tol, "max_iter": max_iter, "preconditioner": preconditioner}
    if method == "primal" or (method == "auto" and columns < rows):
        return solve(GaussNewtonOperator(scaled), -gradient, damping=ridge, method="cg", **options)
    # The step's own residual is J̃ᵀ r / ridge for the dual's residual r, and may be far larger
    # than r: the dual is solved on until the step is good.
    exact, kernel = scaled.double() if precise else scaled, KernelOperator(scaled)
    options["preconditioner"] = prepare(preconditioner, kernel, ridge)
    rhs = -(exact @ gradient).double()
    p = torch.zeros_like(rhs)
    iterations, wanted = 0, tol * float(gradient.norm())
    while True:
        solution = solve(kernel, rhs, damping=ridge, method="cg", x0=p, **options)
        p = solution.x
        iterations += solution.iterations
        pulled = (exact.T @ p).double()
        residual = float((exact.T @ (rhs - exact @ pulled - ridge * p)).norm()) / ridge
        if residual <= wanted or not solution.converged or options["tol"] < 1e-13:
            break
        options["tol"] *= max(0.3 * wanted / residual, 1e-3)
    return dataclasses.replace(solution, x=-(gradient + pulled) / ridge, iterations=iterations)


def fit_convex(
    jacobian: JacobianOperator,
    outputs: Tensor,
    y: Tensor,
    loss: Loss,
    ridge: float,
    method: str = "auto",
    preconditioner: Any = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    callback: Callable[[int, float, float], Any] | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """Minimise a convex loss over the tangent space.

    Parameters
    ----------
    jacobian
        J (N·K, P).
    outputs
        f0 (N, K) float64.
    y
        Targets as ``loss.check`` returned them.
    loss
        See `jacpot.tangent.losses`.
    ridge
        Above zero: without one a separable problem has no minimiser.
    method
        ``"dual"``, ``"primal"`` or ``"auto"``, for the systems inside.
    preconditioner
        Of the systems inside.
    tol
        Bound on ``‖∇L‖`` (the KKT residual) relative to its value at Δ = 0.
    max_iter
        Newton steps; 100 by default.
    callback
        Called with ``(step, relative KKT residual, seconds)``; False stops.
    x0
        First Δ (P,).

    Returns
    -------
    Solution
        ``history`` holds the relative KKT residuals, ``details["loss"]`` the loss after each step,
        ``details["inner_iterations"]`` those of the linear solver.
    """
    if method not in METHODS:
        raise ValueError(
            f"argument 'method' must be one of {METHODS} for losses other than 'mse', "
            f"got {method!r}"
        )
    check_limits(tol, max_iter)
    start = time.perf_counter()
    exact = jacobian.double()
    shape = outputs.shape
    delta = outputs.new_zeros(jacobian.shape[1]) if x0 is None else x0.double()
    change = (exact @ delta).reshape(shape)

    def objective(f: Tensor, d: Tensor) -> float:
        return float(loss.value(f, y).sum() + 0.5 * ridge * d.square().sum())

    def kkt(f: Tensor, d: Tensor) -> Tensor:
        return exact.T @ loss.gradient(f, y).reshape(-1) + ridge * d

    scale = float(kkt(outputs, torch.zeros_like(delta)).norm()) or 1.0
    f = outputs + change
    value, gradient = objective(f, delta), kkt(f, delta)
    history: list[float] = []
    losses, inner, describe = [value], 0, "none"
    residual = float(gradient.norm()) / scale
    status = Status.converged if residual <= tol else Status.iteration_limit
    interrupted = False
    try:
        for step in range(1, (100 if max_iter is None else max_iter) + 1):
            if status is not Status.iteration_limit:
                break
            # Loose at first, tight at the end (Eisenstat & Walker 1996): superlinear convergence.
            forcing = min(0.1, residual**0.5, max(0.5 * tol / residual, 1e-12) ** 0.5)
            direction = newton_direction(
                jacobian, loss.root(f, y), gradient, ridge, forcing, preconditioner, method
            )
            inner += direction.iterations
            describe = direction.preconditioner
            d = direction.x
            slope = float(gradient @ d)
            if not slope < 0:
                status = Status.non_finite if slope != slope else Status.stagnated
                break
            moved = (exact @ d).reshape(shape)
            length = 1.0
            # The loss must fall; where its own rounding hides the change, the gradient must.
            rounding = 8 * torch.finfo(torch.float64).eps * abs(value)
            while True:
                trial, at = f + length * moved, delta + length * d
                after = objective(trial, at)
                if after <= value + SUFFICIENT * length * slope:
                    break
                if (
                    abs(length * slope) <= rounding
                    and float(kkt(trial, at).norm()) < residual * scale
                ):
                    break
                length /= 2
                if length < 1e-10:
                    break
            if length < 1e-10:
                status = Status.stagnated
                break
            f, delta, value = trial, at, min(after, value)
            gradient = kkt(f, delta)
            residual = float(gradient.norm()) / scale
            history.append(residual)
            losses.append(value)
            if residual <= tol:
                status = Status.converged
            if (
                callback is not None
                and callback(step, residual, time.perf_counter() - start) is False
            ):
                status = status if status is Status.converged else Status.interrupted
    except KeyboardInterrupt:
        interrupted, status = True, Status.interrupted
        residual = float(kkt(f, delta).norm()) / scale
    solution = Solution(
        x=delta,
        status=status,
        iterations=len(history),
        residual_norm=residual * scale,
        relative_residual=residual,
        history=history,
        method="newton",
        preconditioner=describe,
        seconds=time.perf_counter() - start,
        details={"loss": losses, "inner_iterations": inner},
    )
    if interrupted:
        raise Interrupted(solution)
    return solution
