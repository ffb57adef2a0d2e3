"""`solve_path`: one matrix, many dampings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from jacpot.linalg.operator import DenseOperator, _as_tensor, as_operator, power_of_two
from jacpot.linalg.preconditioners.cholesky import Cholesky
from jacpot.linalg.solution import Solution, Status
from jacpot.linalg.solve import solve

__all__ = ["solve_path"]

BASIS = 1200  # columns of the shared subspace, at most


def solve_path(
    operator: Any, rhs: Any, dampings: Sequence[float], tol: float = 1e-6
) -> list[Solution]:
    """Solve ``(A + damping·I) x = b`` for many dampings at little more than the price of one.

    For arrays: a rational Krylov space (Ruhe 1984), built from products with ``(A + σ·I)⁻¹`` for
    one σ, or two or three when the path is long, serves all dampings by Galerkin projection.
    Factors are float32, everything else float64. Other operators are solved one by one, from the
    largest damping down, each from the solution before.

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
        where the shared space did not suffice.

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
    basis, images = _shared_space(a, columns / scale, values, tol)
    matrix = a.double()
    small = basis.T @ images
    small, start_block = (small + small.T) / 2, basis.T @ (columns / scale)
    projected, vectors = torch.linalg.eigh(small)
    rotated = vectors.T @ start_block
    xs = [basis @ (vectors @ (rotated / (projected + value)[:, None])) for value in values]
    products = torch.split(matrix._matmat(torch.cat(xs, dim=1)), columns.shape[1], dim=1)
    seconds = (time.perf_counter() - start) / len(values)
    out = []
    for value, x, product in zip(values, xs, products, strict=True):
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
                iterations=basis.shape[1],
                residual_norm=float((norms * scale).max()),
                relative_residual=relative,
                method="rational Krylov path",
                seconds=seconds,
            )
        )
    return out


def _shared_space(
    a: DenseOperator, columns: Tensor, values: list[float], tol: float
) -> tuple[Tensor, Tensor]:
    """Give an orthonormal V (n, d) that holds all solutions to the tolerance, and A V."""
    low, high = math.log(min(values)), math.log(max(values))
    count = 1 + int((high - low) / math.log(1e3))
    poles = [math.exp(low + (high - low) * (i + 0.5) / count) for i in range(count)]
    inverses = [Cholesky().prepare(a, pole).inverse for pole in poles]
    matrix = a.double()
    block = torch.linalg.qr(columns)[0]
    basis, images = block, matrix._matmat(block)
    limit, step = min(BASIS, a.shape[0]), 0
    while basis.shape[1] < limit and all(inverse is not None for inverse in inverses):
        inverse = inverses[step % count]
        assert inverse is not None
        new = inverse._matmat(basis[:, -block.shape[1] :])
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        q, r = torch.linalg.qr(new)
        kept = r.diagonal().abs() > 1e-12 * r.abs().max()
        if not kept.any():
            break
        block = q[:, kept][:, : limit - basis.shape[1]]
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, matrix._matmat(block)], dim=1)
        step += 1
        if step % (2 * count) == 0 and _good_enough(basis, images, columns, values, tol):
            break
    return basis, images


def _good_enough(
    basis: Tensor, images: Tensor, columns: Tensor, values: list[float], tol: float
) -> bool:
    small, start = basis.T @ images, basis.T @ columns
    eye = torch.eye(len(small), dtype=small.dtype)
    norms = columns.norm(dim=0)
    for value in (min(values), math.sqrt(min(values) * max(values)), max(values)):
        y = torch.linalg.solve(small + value * eye, start)
        residual = columns - images @ y - value * (basis @ y)
        if not bool((residual.norm(dim=0) <= 0.3 * tol * norms).all()):
            return False
    return True


def _one_by_one(a: Any, rhs: Any, values: list[float], tol: float) -> list[Solution]:
    found: dict[float, Solution] = {}
    guess: Any = None
    for value in sorted(set(values), reverse=True):
        found[value] = solve(a, rhs, damping=value, tol=tol, x0=guess)
        guess = found[value].x
    return [found[value] for value in values]
