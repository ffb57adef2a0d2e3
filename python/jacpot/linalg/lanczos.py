"""Block Lanczos: one Krylov space for a matrix and all its shifts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve_shifted"]

WIDTH = 12  # of a block at least: products with fewer columns hardly take less time
SHARE = 4  # the space may grow to this part of the whole


def solve_shifted(matrix: Tensor, b: Tensor, shifts: Tensor, tol: float) -> tuple[Tensor, int]:
    """Approximate ``(A + shift·I) x = b`` for many shifts from one block Krylov space.

    ``A + shift·I`` has the same Krylov space for every shift, so that all of them share the
    products with A, which are nearly all the work; what is left is a projected matrix of a few
    hundred rows and its eigenvalues. Block Lanczos (Golub & Underwood 1977), every block made
    orthogonal to all before it, twice. Random columns fill up the first block: a larger space at
    nearly the same price.

    Parameters
    ----------
    matrix
        A (n, n), symmetric, float64.
    b
        (n, R) float64.
    shifts
        (S,) float64. The space grows until the residual for the smallest of them, as the projected
        problem gives it, is below ``tol`` relative to every column, or until it is n / 4 large.

    Returns
    -------
    tuple
        x (n, S, R), with no promise how good it is, and the number of blocks.
    """
    size, count = b.shape
    width = max(WIDTH, -(-count // 4) * 4)
    limit = size // SHARE // width * width
    shape = (size, len(shifts), count)
    if limit < 4 * width:
        return b.new_zeros(shape), 0
    generator = torch.Generator(b.device).manual_seed(0)
    filling = torch.randn(size, width - count, generator=generator, dtype=b.dtype, device=b.device)
    first, start = torch.linalg.qr(torch.cat([b, filling], 1))
    basis = b.new_empty(limit + width, size)  # by rows
    projected = b.new_zeros(limit + width, limit + width)
    basis[:width] = first.T
    goal = tol * b.norm(dim=0)
    check = 4 * width
    for end in range(width, limit + 1, width):
        last, following = slice(end - width, end), slice(end, end + width)
        product = basis[last] @ matrix
        projected[last, last] = product @ basis[last].T
        basis[following], coupling = _orthonormal(product, basis[:end])
        if end >= check or end == limit:
            check = end + end // 16
            projected_b = _padded(start[:, :count], end)
            system = projected[:end, :end].clone()
            system.diagonal().add_(shifts.min())
            y = torch.linalg.solve_ex(system, projected_b)[0]
            if bool(((coupling @ y[last]).norm(dim=0) <= goal).all()):
                break
        projected[following, last], projected[last, following] = coupling, coupling.T
    values, vectors = torch.linalg.eigh(projected[:end, :end])
    coefficients = vectors.T @ _padded(start[:, :count], end)
    filtered = coefficients[:, None] / (values[:, None] + shifts)[:, :, None]
    y = vectors @ filtered.reshape(end, -1)
    return (basis[:end].T @ y).reshape(shape), end // width


def _padded(top: Tensor, size: int) -> Tensor:
    out = top.new_zeros(size, top.shape[1])
    out[: len(top)] = top
    return out


def _orthonormal(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q and R with ``rows = Rᵀ Q`` up to a combination of the basis."""
    triangle = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    for _ in range(2):
        columns, r = torch.linalg.qr((rows - (rows @ basis.T) @ basis).T)
        rows, triangle = columns.T, r @ triangle
    return rows, triangle
