"""`solve_path`: one matrix, many dampings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from jacpot.linalg.operator import (
    DenseOperator,
    LinearOperator,
    _as_tensor,
    as_operator,
    power_of_two,
)
from jacpot.linalg.preconditioners.cholesky import Cholesky
from jacpot.linalg.solution import Solution, Status
from jacpot.linalg.solve import solve

__all__ = ["solve_path"]

SPAN = 10.0  # largest over smallest damping that share a factor
LIMIT = 60  # iterations; about 15 reach 1e-8


def solve_path(
    operator: Any, rhs: Any, dampings: Sequence[float], tol: float = 1e-6
) -> list[Solution]:
    """Solve ``(A + damping·I) x = b`` for many dampings at little more than the price of one.

    For arrays: the float32 Cholesky factor at one damping preconditions all within half a decade
    of it to a condition of three, and conjugate gradients run on the columns of all of them
    together, in float64. Other operators are solved one by one, from the largest damping down,
    each from the solution before.

    Parameters
    ----------
    operator
        As in :func:`jacpot.solve`, symmetric positive semidefinite.
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
    values = [float(damping) for damping in dampings]
    if not all(0 < value < math.inf for value in values):
        raise ValueError("argument 'dampings' must hold finite values above 0")
    b = _as_tensor(rhs, "rhs")
    a = as_operator(operator, rhs)
    if not values:
        return []
    if not isinstance(a, DenseOperator) or 0 in b.shape or not bool(torch.isfinite(b).all()):
        return _one_by_one(a, rhs, values, tol)
    start = time.perf_counter()
    columns = b.double() if b.ndim == 2 else b.double()[:, None]
    scale = power_of_two(columns)
    matrix = a.double()
    found: dict[float, Tensor] = {}
    counts: dict[float, int] = {}
    for pole, group in _groups(values):
        blocks, iterations = _together(a, matrix, columns / scale, pole, group, tol)
        found.update(zip(group, blocks, strict=True))
        counts.update(dict.fromkeys(group, iterations))
    seconds = (time.perf_counter() - start) / len(values)
    out = []
    for value in values:
        x = found[value]
        product = matrix._matmat(x)
        norms = (columns / scale - product - value * x).norm(dim=0)
        relative = float((norms / (columns / scale).norm(dim=0).clamp_min(1e-300)).max())
        if not relative <= tol:
            out.append(solve(operator, rhs, damping=value, tol=tol))
            continue
        shaped = (x * scale).reshape(b.shape)
        out.append(
            Solution(
                x=shaped.numpy() if isinstance(rhs, numpy.ndarray) else shaped,
                status=Status.converged,
                iterations=counts[value],
                residual_norm=float((norms * scale).max()),
                relative_residual=relative,
                method="cg path",
                seconds=seconds,
            )
        )
    return out


def _groups(values: list[float]) -> list[tuple[float, list[float]]]:
    """Cut the path where it is `SPAN` long; give the middle of each piece and its dampings."""
    ordered = sorted(set(values))
    low, high = math.log(ordered[0]), math.log(ordered[-1])
    count = max(1, math.ceil((high - low) / math.log(SPAN)))
    width = (high - low) / count
    groups: dict[int, list[float]] = {}
    for value in ordered:
        at = min(count - 1, int((math.log(value) - low) / width)) if width else 0
        groups.setdefault(at, []).append(value)
    return [(math.exp(low + (at + 0.5) * width), group) for at, group in groups.items()]


def _together(
    a: DenseOperator,
    matrix: LinearOperator,
    columns: Tensor,
    pole: float,
    values: list[float],
    tol: float,
) -> tuple[list[Tensor], int]:
    """Solve for some dampings by conjugate gradients, their columns side by side."""
    r = columns.repeat(1, len(values))
    shift = torch.tensor(values, dtype=torch.float64).repeat_interleave(columns.shape[1])
    x, target = torch.zeros_like(r), 0.5 * tol * r.norm(dim=0)
    inverse, iterations = Cholesky().prepare(a, pole).inverse, 0
    p = r if inverse is None else inverse._matmat(r)
    while inverse is not None and iterations < LIMIT and bool((r.norm(dim=0) > target).any()):
        q = torch.addcmul(matrix._matmat(p), p, shift)
        curvature = (p * q).sum(0)
        positive = curvature > 0
        curvature = torch.where(positive, curvature, 1.0)
        step = torch.where(positive, (p * r).sum(0) / curvature, 0.0)
        x.addcmul_(p, step)
        r.addcmul_(q, step, value=-1)
        z = inverse._matmat(r)
        p = z.addcmul(p, (z * q).sum(0) / curvature, value=-1)
        iterations += 1
    return list(torch.split(x, columns.shape[1], dim=1)), iterations


def _one_by_one(a: Any, rhs: Any, values: list[float], tol: float) -> list[Solution]:
    found: dict[float, Solution] = {}
    guess: Any = None
    for value in sorted(set(values), reverse=True):
        found[value] = solve(a, rhs, damping=value, tol=tol, x0=guess)
        guess = found[value].x
    return [found[value] for value in values]
