"""`solve`: one door to all linear solvers."""

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
from jacpot.linalg.arguments import check_limits, check_number
from jacpot.linalg.operator import (
    DenseOperator,
    LinearOperator,
    _as_tensor,
    as_operator,
    power_of_two_above,
)
from jacpot.linalg.preconditioners import (
    Cholesky,
    Diagonal,
    Identity,
    Nystrom,
    PartialCholesky,
    Preconditioner,
    Prepared,
)
from jacpot.linalg.solution import Interrupted, Solution, Status
from jacpot.linalg.system import EXTREME, AffineOperator, System, shifted
from jacpot.ops.arrays import like

__all__ = ["iterate", "prepare", "solve"]

Callback = Callable[[int, float, float], Any]

METHODS = ("auto", "cg", "block_cg", "minres", "lsmr", "cholesky")

CHOLESKY_SIZE = 20_000  # a float32 factor of this size takes 1.6 GB

NAMED: dict[str, Preconditioner] = {
    "none": Identity(),
    "diagonal": Diagonal(),
    "nystrom": Nystrom(),
    "partial_cholesky": PartialCholesky(),
}


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
        takes Cholesky for symmetric arrays, CG for other square operators, and LSMR for the rest.
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
    b = _as_tensor(rhs, "rhs")
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
    limit = min(10 * a.shape[1], 20_000) if max_iter is None else max_iter
    options = (method, preconditioner, float(tol), limit, callback)
    system = System(a, float(damping), method == "lsmr" and not shifted(a))
    attempt = _attempt(system, 1.0, columns, guess, *options)
    if not attempt.interrupted and _is_extreme(attempt.result["largest"], largest):
        unit = system.unit()
        if unit != 1:
            attempt = _attempt(system, unit, attempt.columns, guess, *options)
    out: Any = attempt.x.mul_(scale)
    if attempt.unit != 1:
        out.div_(attempt.unit)
    status, norms = attempt.judge(scales, scale, float(tol))
    relative = [
        n / of_b if of_b else math.inf if n else 0.0
        for n, of_b in zip(norms, attempt.result["rhs_norms"], strict=True)
    ]
    # NaN is worse than any number.
    order = range(len(relative))
    worst = max(order, key=lambda i: (math.isnan(relative[i]), relative[i]), default=None)
    solution = Solution(
        x=like(out.view(shape), rhs),
        status=status,
        iterations=attempt.result["iterations"],
        residual_norm=0.0 if worst is None else norms[worst] * scales[worst],
        relative_residual=0.0 if worst is None else relative[worst],
        history=attempt.result["history"],
        method=method,
        preconditioner=attempt.description,
        seconds=time.perf_counter() - start,
        setup_seconds=attempt.setup_seconds,
        details={"products": attempt.result.get("products", 0)},
    )
    if attempt.interrupted:
        raise Interrupted(solution)
    return solution


def _largest(columns: Tensor) -> list[float]:
    """Give the largest size of an element of each column; NaN where there is one."""
    if len(columns) == 0:
        return [0.0] * columns.shape[1]
    sizes: list[float] = columns.abs().amax(dim=0).tolist()
    return sizes


def _first_guess(x0: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    guess = _as_tensor(x0, "x0")
    if guess.shape != shape:
        raise ValueError(f"argument 'x0' must have shape {shape}, got {tuple(guess.shape)}")
    if guess.device != device:
        raise ValueError(f"argument 'x0' must be on {device} like 'rhs', got {guess.device}")
    if not torch.isfinite(guess).all():
        raise ValueError("argument 'x0' must be finite, got NaN or infinity")
    return guess


@dataclass
class _Attempt:
    """What a solver made of ``(A + damping·I) / unit · x = columns``; see `iterate`."""

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


def _attempt(
    system: System,
    unit: float,
    columns: Tensor,
    guess: Tensor | None,
    method: str,
    preconditioner: Any,
    tol: float,
    limit: int,
    callback: Callback | None,
) -> _Attempt:
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
    return _Attempt(scaled, unit, columns, x, result, prepared.description, setup)


def _is_extreme(sizes: list[float], sizes_b: list[float]) -> bool:
    """Tell whether the operator's squares may have left the range of float64.

    With right-hand sides near one the solution is far from it then, or none was found.
    """
    pairs = zip(sizes, sizes_b, strict=True)
    return any(of_b > 0 and not 1 / EXTREME < of_x < EXTREME for of_x, of_b in pairs)


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


def prepare(preconditioner: Any, a: LinearOperator, damping: float) -> Prepared:
    """Make what :func:`solve` takes as ``preconditioner`` for ``a + damping·I``."""
    if preconditioner is None:
        return Prepared(None, "none")
    if isinstance(preconditioner, str):
        if preconditioner not in NAMED:
            raise ValueError(
                f"argument 'preconditioner' must be one of {sorted(NAMED)}, got {preconditioner!r}"
            )
        preconditioner = NAMED[preconditioner]
    if isinstance(preconditioner, Prepared):
        return preconditioner
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(a, damping)
    if isinstance(preconditioner, LinearOperator):
        inverse = preconditioner
    elif callable(preconditioner):
        inverse = as_operator(
            preconditioner, torch.empty(a.shape[0], 1, dtype=a.dtype, device=a.device)
        )
    else:
        raise TypeError(
            "argument 'preconditioner' must be None, a name, a Preconditioner, a LinearOperator "
            f"or a function, got {type(preconditioner).__name__}"
        )
    if inverse.shape != a.shape:
        raise ValueError(
            f"argument 'preconditioner' must have shape {a.shape} like the operator, "
            f"got {inverse.shape}"
        )
    return Prepared(inverse, type(preconditioner).__name__)
