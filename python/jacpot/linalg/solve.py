"""`solve`: one door to all linear solvers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg.arguments import check_limits, check_number, float_tensor
from jacpot.linalg.attempt import Callback, attempt
from jacpot.linalg.conversion import as_operator
from jacpot.linalg.operator import DenseOperator, LinearOperator
from jacpot.linalg.scaling import power_of_two_above
from jacpot.linalg.solution import Interrupted, Solution, Status
from jacpot.linalg.system import EXTREME, System, shifted
from jacpot.ops.arrays import like

__all__ = ["is_symmetric", "solve"]

METHODS = ("auto", "cg", "block_cg", "minres", "lsmr", "cholesky")

CHOLESKY_SIZE = 20_000  # a float32 factor of this size takes 1.6 GB


def solve(
    operator: Any,
    rhs: Any,
    damping: float = 0.0,
    method: str = "auto",
    tol: float = 1e-6,
    max_iter: int | None = None,
    x0: Any = None,
    preconditioner: Any = None,
    callback: Callback | None = None,
) -> Solution:
    """Solve ``(A + damping·I) x = b``, or ``min ‖A x − b‖² + damping·‖x‖²`` when not square.

    A Jacobian is always taken for least squares, also where it happens to be square.

    Parameters
    ----------
    operator
        The matrix A (m, n): an array, a sparse tensor, a `Jacobian` (N·K, P), a `LinearOperator`,
        an operator of SciPy or CuPy, or a function ``v -> A v`` (see `jacpot.linalg.as_operator`).
    rhs
        b, (m,) or (m, R): a tensor, NumPy or CuPy array, float32 or float64. On a GPU the
        operator must be on the same one.
    damping
        Non-negative.
    method
        ``"cg"`` for symmetric positive (semi-)definite operators, ``"block_cg"`` for such with
        several right-hand sides, which then share one search space; ``"cholesky"`` for such as fit
        in memory, refined to float64 accuracy; ``"minres"`` for symmetric ones of any signature;
        ``"lsmr"`` for any shape, which gives the least-squares solution of least norm. ``"auto"``
        takes Cholesky for symmetric arrays, CG for other square operators, and LSMR for the rest;
        for a Jacobian with damping preconditioned CG on ``A Aᵀ`` or ``Aᵀ A``, whichever is smaller,
        where squaring the condition number leaves the accuracy asked for. LSMR judges the result,
        and goes on from it if need be.
    tol
        Relative to the norm of each right-hand side.
    max_iter
        By default 10 n, at most 20,000.
    x0
        First guess, of the shape of the solution.
    preconditioner
        None; an object of `jacpot.linalg.preconditioners`, or ``"none"``, ``"diagonal"``,
        ``"nystrom"`` or ``"partial_cholesky"`` for one with default settings; or a
        `LinearOperator` or function that approximates the inverse of ``A + damping·I``,
        symmetric positive definite. For ``"minres"`` it is to approximate the inverse of that
        matrix's absolute value, and for ``"lsmr"`` of ``Aᵀ A + damping·I``, or of
        ``(A + damping·I)ᵀ (A + damping·I)``: objects and names are made for those. Where the
        least-squares solution is not unique, the one that LSMR then gives is of least norm
        for the preconditioner's inverse.
    callback
        Called with ``(iteration, relative residual, seconds)``; returning False stops.

    Returns
    -------
    Solution
        Converged means that the residual r recomputed from ``solution.x`` in float64 is below the
        tolerance; of a least-squares problem, where some of it stays, ``‖Aᵀ r‖`` relative to
        ``‖A‖ ‖r‖`` (Paige & Saunders 1982). Without convergence nothing is raised: see
        ``solution.status``, or call ``solution.raise_if_failed()``.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, dtype, shape or value; the message names the argument.
    Interrupted
        On Ctrl-C; its ``solution`` holds the iterate reached so far.

    Notes
    -----
    Products run in the operator's own dtype, everything else in float64; the residual is replaced
    by a recomputed float64 one whenever rounding could matter (van der Vorst & Ye 2000), so
    float32 operators reach small residuals too.

    Examples
    --------
    >>> import torch, jacpot
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> solution = jacpot.solve(A, torch.tensor([1.0, 2.0], dtype=torch.float64), tol=1e-10)
    >>> solution.converged, solution.x
    (True, tensor([0.0909, 0.6364], dtype=torch.float64))
    """
    start = time.perf_counter()
    b = float_tensor("rhs", rhs)
    if b.ndim not in (1, 2):
        raise ValueError(f"argument 'rhs' must have 1 or 2 dimensions, got shape {tuple(b.shape)}")
    columns = b if b.ndim == 2 else b.unsqueeze(1)
    largest = _largest(columns)
    if not all(map(math.isfinite, largest)):
        raise ValueError("argument 'rhs' must be finite, got NaN or infinity")
    a = as_operator(operator, rhs)
    if a.device != b.device:
        raise ValueError(f"argument 'operator' must be on {b.device} like 'rhs', got {a.device}")
    _check_arguments(a, b, damping, tol, max_iter)
    damping = float(damping)
    limit = min(10 * a.shape[1], 20_000) if max_iter is None else max_iter
    if method == "auto" and preconditioner is None and _is_better_squared(a, damping, tol):
        first = _solve_squared(a, rhs, damping, tol, limit, x0, callback)
        return _judge_squared(first, a, rhs, damping, tol, limit, callback, start)
    method = _choose(method, a, preconditioner is not None)
    if isinstance(a, DenseOperator) and method != "lsmr":
        a = DenseOperator(a.matrix)
        a.symmetric = True
    if preconditioner is not None and method == "cholesky":
        raise ValueError("argument 'preconditioner': method 'cholesky' has its own, use 'cg'")
    # Powers of two near the largest element: exact, and nothing over- or underflows.
    scales = [power_of_two_above(size) for size in largest]
    scale = columns.new_tensor(scales, dtype=torch.float64)
    columns = (columns / scale).contiguous()
    shape = (a.shape[1], *b.shape[1:])
    guess = None
    if x0 is not None:
        guess = _first_guess(x0, shape, b.device).double().reshape(a.shape[1], -1) / scale
        # Of a zero right-hand side the solution is known.
        guess = torch.where(columns.any(dim=0), guess, 0.0)
    options = (method, preconditioner, float(tol), limit, callback)
    system = System(a, damping, method == "lsmr" and not shifted(a))
    run = attempt(system, 1.0, columns, guess, *options)
    if not run.interrupted and _is_extreme(run.result["largest"], largest):
        unit = system.unit()
        if unit != 1:
            run = attempt(system, unit, run.columns, guess, *options)
    out: Any = run.x.mul_(scale)
    if run.unit != 1:
        out.div_(run.unit)
    status, norms = run.judge(scales, scale, float(tol))
    relative = [
        n / of_b if of_b else math.inf if n else 0.0
        for n, of_b in zip(norms, run.result["rhs_norms"], strict=True)
    ]
    # NaN is worse than any number.
    order = range(len(relative))
    worst = max(order, key=lambda i: (math.isnan(relative[i]), relative[i]), default=None)
    solution = Solution(
        x=like(out.view(shape), rhs),
        status=status,
        iterations=run.result["iterations"],
        residual_norm=0.0 if worst is None else norms[worst] * scales[worst],
        relative_residual=0.0 if worst is None else relative[worst],
        history=run.result["history"],
        method=method,
        preconditioner=run.description,
        seconds=time.perf_counter() - start,
        setup_seconds=run.setup_seconds,
        details={"products": run.result.get("products", 0)},
    )
    if run.interrupted:
        raise Interrupted(solution)
    return solution


def _is_better_squared(a: LinearOperator, damping: float, tol: float) -> bool:
    """Tell whether damped least squares are to be solved by way of ``A Aᵀ`` or ``Aᵀ A``."""
    if damping == 0 or shifted(a) or a.square_preconditioner is None or 0 in a.shape:
        return False
    # The trace bounds the square of the norm, and so the rounding of the square system.
    trace = float(a._kernel().diagonal().double().sum())
    return torch.finfo(torch.float64).eps * trace <= tol * damping


def _solve_squared(
    a: LinearOperator, rhs: Any, damping: float, tol: float, limit: int, x0: Any,
    callback: Callback | None,
) -> Solution:  # fmt: skip
    """Solve ``x = Aᵀ (A Aᵀ + damping·I)⁻¹ b`` or ``(Aᵀ A + damping·I) x = Aᵀ b``."""
    b = float_tensor("rhs", rhs).double()
    exact, wide = a.double(), a.shape[0] <= a.shape[1]
    guess = None
    if x0 is not None:
        guess = _first_guess(x0, (a.shape[1], *b.shape[1:]), b.device).double()
        # At the solution (A Aᵀ + damping·I)⁻¹ b is the residual over the damping.
        guess = (b - exact @ guess) / damping if wide else guess

    def found(solution: Solution) -> Solution:
        x = exact.T @ solution.x if wide else solution.x
        method = "cg on A Aᵀ" if wide else "cg on Aᵀ A"
        return replace(solution, x=like(x, rhs), method=method)

    options: dict[str, Any] = {"max_iter": limit, "x0": guess, "callback": callback}
    options["preconditioner"] = a.square_preconditioner
    try:
        if wide:
            return found(solve(a._kernel(), b, damping, "cg", tol, **options))
        return found(solve(a._normal(), exact.T @ b, damping, "cg", tol, **options))
    except Interrupted as stop:
        raise Interrupted(found(stop.solution)) from None


def _judge_squared(
    first: Solution, a: LinearOperator, rhs: Any, damping: float, tol: float, limit: int,
    callback: Callback | None, start: float,
) -> Solution:  # fmt: skip
    """Let LSMR say what the solution is worth, and improve it as far as iterations are left."""
    last = first
    if first.status is not Status.interrupted:
        usable = bool(torch.isfinite(float_tensor("x", first.x)).all())
        options: dict[str, Any] = {"x0": first.x if usable else None, "callback": callback}
        left = max(0, limit - first.iterations)
        judged = solve(a, rhs, damping, "lsmr", tol, left, **options)
        last = replace(
            judged,
            iterations=first.iterations + judged.iterations,
            history=first.history + judged.history,
            method=first.method + (", then lsmr" if judged.iterations else ""),
            preconditioner=first.preconditioner,
            setup_seconds=first.setup_seconds,
            details={"products": first.details["products"] + judged.details["products"]},
        )
    return replace(last, seconds=time.perf_counter() - start)


def _largest(columns: Tensor) -> list[float]:
    """Give the largest size of an element of each column; NaN where there is one."""
    if len(columns) == 0:
        return [0.0] * columns.shape[1]
    sizes: list[float] = columns.abs().amax(dim=0).tolist()
    return sizes


def _first_guess(x0: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    guess = float_tensor("x0", x0)
    if guess.shape != shape:
        raise ValueError(f"argument 'x0' must have shape {shape}, got {tuple(guess.shape)}")
    if guess.device != device:
        raise ValueError(f"argument 'x0' must be on {device} like 'rhs', got {guess.device}")
    if not torch.isfinite(guess).all():
        raise ValueError("argument 'x0' must be finite, got NaN or infinity")
    return guess


def _is_extreme(sizes: list[float], sizes_b: list[float]) -> bool:
    """Tell whether the operator's squares may have left the range of float64.

    With right-hand sides near one the solution is far from it then, or none was found.
    """
    pairs = zip(sizes, sizes_b, strict=True)
    return any(of_b > 0 and not 1 / EXTREME < of_x < EXTREME for of_x, of_b in pairs)


def _check_arguments(
    a: LinearOperator, b: Tensor, damping: float, tol: float, max_iter: int | None
) -> None:
    if b.shape[0] != a.shape[0]:
        raise ValueError(
            f"argument 'rhs' must have {a.shape[0]} rows like the operator, got {b.shape[0]}"
        )
    check_number("damping", damping)
    check_limits(tol, max_iter)


def _choose(method: str, a: LinearOperator, preconditioned: bool) -> str:
    square = a.shape[0] == a.shape[1]
    if method == "auto":
        if not square or a.least_squares:
            return "lsmr"
        if preconditioned or not isinstance(a, DenseOperator):
            return "cg"
        if not is_symmetric(a.matrix):
            return "lsmr"
        return "cholesky" if a.shape[0] <= CHOLESKY_SIZE else "cg"
    if method not in METHODS:
        raise ValueError(f"argument 'method' must be one of {METHODS}, got {method!r}")
    if method != "lsmr" and (not square or a.least_squares):
        got = f"shape {a.shape}" if not square else "a Jacobian"
        raise ValueError(
            f"argument 'method': {method!r} needs a square operator, got {got}; use 'lsmr'"
        )
    return method


def is_symmetric(matrix: Tensor) -> bool:
    """Tell whether a matrix is symmetric up to the rounding of its making."""
    if matrix.numel() == 0:
        return True
    bound = 100 * torch.finfo(matrix.dtype).eps * float(torch.linalg.vector_norm(matrix, math.inf))
    # In tiles, which are compared with their transposes from cache.
    size = 512
    starts = range(0, len(matrix), size)
    for i in starts:
        for j in starts[i // size :]:
            upper, lower = matrix[i : i + size, j : j + size], matrix[j : j + size, i : i + size]
            # Not finite counts as symmetric: that is for the solver to say.
            if float((upper - lower.T).abs_().max()) > bound:
                return False
    return True
