"""The solvers of :func:`jacpot.solve` for systems on a GPU.

As on the CPU, products run in the operator's dtype and everything else in float64, and only a
residual that was recomputed in float64 counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from jacpot.linalg.cuda_block_cg import BlockConjugateGradients
from jacpot.linalg.cuda_cg import ConjugateGradients
from jacpot.linalg.cuda_lsmr import LeastSquares
from jacpot.linalg.cuda_minres import MinimalResidual
from jacpot.linalg.cuda_refine import refine
from jacpot.linalg.operator import LinearOperator

__all__ = ["iterate"]

SOLVERS: dict[str, Any] = {
    "cg": ConjugateGradients,
    "block_cg": BlockConjugateGradients,
    "lsmr": LeastSquares,
    "minres": MinimalResidual,
}


def iterate(
    method: str,
    a: LinearOperator,
    b: Tensor,
    x: Tensor,
    damping: float,
    inverse: LinearOperator | None,
    tol: float,
    max_iter: int,
    callback: Callable[[int, float, float], Any] | None,
) -> dict[str, Any]:
    """Improve ``x`` (n, R) in place until ``(A + damping·I) x = b`` (m, R) is solved.

    Returns
    -------
    dict
        ``outcome``, ``iterations``, ``history``, ``products`` and ``residual_norms``; without the
        last after Ctrl-C.
    """
    return refine(SOLVERS[method](a, b, x, damping, inverse, tol, max_iter, callback))
