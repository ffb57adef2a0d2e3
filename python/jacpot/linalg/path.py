"""`solve_path`: one matrix, many dampings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg.arguments import check_limits, check_number, float_tensor
from jacpot.linalg.attempt import iterate
from jacpot.linalg.conversion import as_operator
from jacpot.linalg.lanczos import solve_shifted
from jacpot.linalg.operator import DenseOperator, LinearOperator
from jacpot.linalg.preconditioners.cholesky import Cholesky
from jacpot.linalg.scaling import power_of_two
from jacpot.linalg.solution import Solution, Status
from jacpot.linalg.solve import is_symmetric, solve
from jacpot.linalg.system import shifted
from jacpot.ops.arrays import like

__all__ = ["solve_path"]

SPAN = 10.0  # largest over smallest damping that share a factor
LIMIT = 60  # iterations; about 15 reach 1e-8


def solve_path(
    operator: Any, rhs: Any, dampings: Sequence[float], tol: float = 1e-6
) -> list[Solution]:
    """Solve ``(A + damping·I) x = b`` for many dampings at little more than the price of one.

    For arrays: all dampings have the same block Krylov space, and one of a quarter of the size of
    the matrix or less is mostly enough for all of them. What it leaves is taken further by
    conjugate gradients in float64 on the columns of many dampings together: the float32 Cholesky
    factor at one damping preconditions all within half a decade of it to a condition of three.
    Other operators are solved one by one, from the largest damping down, each from the solution
    before.

    Parameters
    ----------
    operator
        As in :func:`jacpot.solve`, square; the short cut is for symmetric positive semidefinite
        arrays.
    rhs
        (m,) or (m, R).
    dampings
        Above zero.
    tol
        Relative to the norm of each right-hand side.

    Returns
    -------
    list of Solution
        In the order of ``dampings``; each judged by its own recomputed residual, and solved alone
        where that is not below the tolerance.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import solve_path
    >>> A = torch.diag(torch.tensor([1.0, 3.0]))
    >>> [solution.x for solution in solve_path(A, torch.ones(2), [1.0, 5.0])]
    [tensor([0.5000, 0.2500], dtype=torch.float64), tensor([0.1667, 0.1250], dtype=torch.float64)]
    """
    values = [check_number("dampings", damping, zero=False) for damping in dampings]
    check_limits(tol, None)
    b = float_tensor("rhs", rhs)
    a = as_operator(operator, rhs)
    if not shifted(a):
        got = f"shape {a.shape}" if a.shape[0] != a.shape[1] else "a Jacobian"
        raise ValueError(f"argument 'operator' must be a square matrix, got {got}")
    if b.ndim not in (1, 2) or b.shape[0] != a.shape[0]:
        raise ValueError(
            f"argument 'rhs' must have shape ({a.shape[0]},) or ({a.shape[0]}, R), "
            f"got {tuple(b.shape)}"
        )
    if not values:
        return []
    plain = isinstance(a, DenseOperator) and b.numel() and bool(torch.isfinite(b).all())
    if not (plain and isinstance(a, DenseOperator) and is_symmetric(a.matrix)):
        return _one_by_one(a, rhs, values, tol)
    start = time.perf_counter()
    columns = b.double() if b.ndim == 2 else b.double()[:, None]
    scale = power_of_two(columns)
    columns = columns / scale
    matrix = a.double().dense()
    unique = sorted(set(values))
    shifts = torch.tensor(unique, dtype=torch.float64, device=b.device)
    x, blocks = solve_shifted(matrix, columns, shifts, 0.5 * tol)
    norms = _residual(matrix, columns, shifts, x).norm(dim=0)
    goal = tol * columns.norm(dim=0)
    how = dict.fromkeys(unique, ("block lanczos", blocks))
    left = [i for i in range(len(unique)) if not bool((norms[i] <= goal).all())]
    for pole, group in _groups(left, unique):
        guess = x[:, group].nan_to_num(0.0, 0.0, 0.0)
        x[:, group], norms[group], iterations = _together(
            a, pole, matrix, columns, shifts[group], guess, tol
        )
        how.update((unique[i], ("cg path", iterations)) for i in group)
    relative = (norms / columns.norm(dim=0).clamp_min(1e-300)).amax(1).tolist()
    seconds = (time.perf_counter() - start) / len(values)
    out = []
    for value in values:
        i = unique.index(value)
        if not relative[i] <= tol:
            out.append(solve(operator, rhs, damping=value, tol=tol))
            continue
        method, iterations = how[value]
        out.append(
            Solution(
                x=like((x[:, i] * scale).reshape(b.shape), rhs),
                status=Status.converged,
                iterations=iterations,
                residual_norm=float((norms[i] * scale).max()),
                relative_residual=relative[i],
                method=method,
                seconds=seconds,
            )
        )
    return out


def _residual(matrix: Tensor, columns: Tensor, shifts: Tensor, x: Tensor) -> Tensor:
    """``b - (A + shift·I) x`` for x (n, S, R)."""
    product = (matrix @ x.reshape(len(x), -1)).view(x.shape)
    return columns[:, None] - product.addcmul_(x, shifts[:, None])


def _groups(indices: list[int], values: list[float]) -> list[tuple[float, list[int]]]:
    """Cut a part of the path where it is `SPAN` long; give the middle of each piece, and it."""
    if not indices:
        return []
    low, high = math.log(values[indices[0]]), math.log(values[indices[-1]])
    count = max(1, math.ceil((high - low) / math.log(SPAN)))
    width = (high - low) / count
    groups: dict[int, list[int]] = {}
    for i in indices:
        at = min(count - 1, int((math.log(values[i]) - low) / width)) if width else 0
        groups.setdefault(at, []).append(i)
    return [(math.exp(low + (at + 0.5) * width), group) for at, group in groups.items()]


class _Shifted(LinearOperator):
    """``A + shift·I`` with a shift (C,) of its own for each of the columns that it multiplies."""

    def __init__(self, matrix: Tensor, shifts: Tensor) -> None:
        self.matrix, self.shifts = matrix, shifts
        self.shape, self.dtype = (len(matrix), len(matrix)), matrix.dtype
        self.device = matrix.device

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.matrix @ x, x, self.shifts)


def _together(
    a: DenseOperator, pole: float, matrix: Tensor, columns: Tensor, shifts: Tensor, x: Tensor,
    tol: float,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Improve x (n, S, R) by conjugate gradients, the columns of all dampings side by side.

    Returns
    -------
    tuple
        x, the norms of its residuals (S, R), and the iterations.
    """
    operator = _Shifted(matrix, shifts.repeat_interleave(columns.shape[1]))
    inverse = Cholesky().prepare(a, pole).inverse
    b, flat = columns.repeat(1, len(shifts)), x.reshape(len(x), -1).contiguous()
    limit = 0 if inverse is None else LIMIT
    result = iterate("cg", operator, b, flat, 0.0, inverse, 0.5 * tol, limit, None)
    norms = torch.tensor(result["residual_norms"], dtype=torch.float64, device=x.device)
    return flat.view(x.shape), norms.view(x.shape[1:]), result["iterations"]


def _one_by_one(a: Any, rhs: Any, values: list[float], tol: float) -> list[Solution]:
    found: dict[float, Solution] = {}
    guess: Any = None
    for value in sorted(set(values), reverse=True):
        found[value] = solve(a, rhs, damping=value, tol=tol, x0=guess)
        guess = found[value].x
    return [found[value] for value in values]
