"""`solve` for right-hand sides on a GPU: conjugate gradients that hardly ever wait, and Cholesky.

Scalars of the recurrence stay on the device, and the host looks at the residual only every few
iterations. As on the CPU, products run in the operator's dtype and everything else in float64, and
only a residual that was recomputed in float64 counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.linalg.solution import Solution, Status

__all__ = ["solve_on_cuda"]

CHECK_EVERY = 8  # iterations between two looks at the residual
PATIENCE = 3  # recomputed residuals in a row that are no smaller, before it counts as stagnated
PANEL_BYTES = 256 << 20  # of a float32 matrix that is widened at a time

Product = Callable[[Tensor], Tensor]


def solve_on_cuda(
    operator: Any,
    rhs: Tensor,
    damping: float,
    method: str,
    tol: float,
    max_iter: int | None,
    x0: Tensor | None,
    preconditioner: Any,
    callback: Callable[[int, float, float], Any] | None,
) -> Solution:
    """Solve as :func:`jacpot.solve` does, where ``rhs`` is a CUDA tensor.

    ``operator`` is a symmetric positive definite CUDA tensor, or a function of ``(n, R)`` tensors
    (``rhs``'s dtype) or anything with ``@``; ``preconditioner`` None or such a function.
    """
    start = time.perf_counter()
    multiply, exact, dtype = _products(operator, rhs)
    b = rhs.detach().double().reshape(len(rhs), -1).contiguous()
    x = torch.zeros_like(b) if x0 is None else x0.detach().double().reshape(b.shape).clone()
    if method == "auto":
        method = "cg"
    if method not in ("cg", "cholesky"):
        raise NotImplementedError(
            f"method {method!r} has no CUDA version; 'cg' and 'cholesky' have, or move the "
            "system to the CPU"
        )
    inverse = preconditioner
    if method == "cholesky":
        inverse = _cholesky(operator, damping)
    limit = min(10 * len(b), 20_000) if max_iter is None else max_iter
    solver = _ConjugateGradients(multiply, exact, dtype, damping, inverse, b, x, tol, limit)
    status = solver.run(callback, start)
    relative = _relative(solver.norms, solver.norm_b)
    worst = int(relative.argmax()) if len(relative) else None
    return Solution(
        x=x.reshape(rhs.shape),
        status=status,
        iterations=solver.iterations,
        residual_norm=0.0 if worst is None else float(solver.norms[worst]),
        relative_residual=0.0 if worst is None else float(relative[worst]),
        history=solver.history,
        method=method,
        preconditioner="none" if inverse is None else type(inverse).__name__,
        seconds=time.perf_counter() - start,
    )


def _relative(norms: Tensor, of: Tensor) -> Tensor:
    return torch.where(norms > 0, norms / of, torch.zeros_like(norms))


def _products(operator: Any, rhs: Tensor) -> tuple[Product, Product, torch.dtype]:
    """Give products in the operator's own dtype and in float64, and that dtype."""
    if isinstance(operator, Tensor):
        if operator.device != rhs.device:
            raise ValueError(
                f"argument 'operator' must be on {rhs.device} like 'rhs', got {operator.device}"
            )
        if operator.shape != (len(rhs), len(rhs)):
            raise ValueError(
                f"argument 'operator' must have shape {(len(rhs), len(rhs))} to be solved on a "
                f"GPU, got {tuple(operator.shape)}"
            )
        matrix = operator.detach()
        return matrix.__matmul__, lambda x: _exact(matrix, x), matrix.dtype
    if callable(operator):
        flat = rhs.ndim == 1

        def call(x: Tensor) -> Tensor:
            product: Tensor = operator(x[:, 0])[:, None] if flat else operator(x)
            return product

        return call, lambda x: call(x.to(rhs.dtype)).double(), rhs.dtype
    return operator.__matmul__, operator.double().__matmul__, operator.dtype


def _exact(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply in float64 without a float64 copy of the whole matrix."""
    if matrix.dtype == torch.float64:
        return matrix @ x
    rows = max(1, PANEL_BYTES // max(1, matrix.shape[1] * 8))
    return torch.cat([part.double() @ x for part in matrix.split(rows)])  # type: ignore[no-untyped-call]


def _cholesky(operator: Any, damping: float) -> Product:
    if not isinstance(operator, Tensor):
        raise TypeError(
            "method 'cholesky' needs argument 'operator' to be a tensor, got "
            f"{type(operator).__name__}"
        )
    damped = operator.detach().clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise ValueError("argument 'operator' is not positive definite in its dtype: more damping")

    def inverse(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.to(factor.dtype), factor).double()

    return inverse


class _ConjugateGradients:
    def __init__(
        self,
        multiply: Product,
        exact: Product,
        dtype: torch.dtype,
        damping: float,
        inverse: Product | None,
        b: Tensor,
        x: Tensor,
        tol: float,
        limit: int,
    ) -> None:
        self.multiply, self.exact, self.damping, self.inverse = multiply, exact, damping, inverse
        self.b, self.x, self.limit = b, x, limit
        self.kernels, self.queue = _backend.cuda(), _backend.queue(b)
        blocks = self.kernels.cg_blocks(*b.shape, self.queue[0])
        self.curvature, self.partial = (b.new_empty(blocks, b.shape[1]) for _ in range(2))
        self.rz, self.next_rz = b.new_zeros(b.shape[1]), b.new_zeros(b.shape[1])
        self.negative = torch.zeros(b.shape[1], dtype=torch.int32, device=b.device)
        self.p, self.working = torch.zeros_like(b), torch.zeros_like(b, dtype=dtype)
        self.norm_b = b.norm(dim=0).cpu()
        self.target = tol * self.norm_b
        self.iterations = 0
        self.history: list[float] = []

    def run(self, callback: Callable[[int, float, float], Any] | None, start: float) -> Status:
        """Iterate until a recomputed residual is small enough, or cannot become so."""
        best, idle = None, 0
        while True:
            self.r = self.b - self.exact(self.x) - self.damping * self.x
            self.norms = self.r.norm(dim=0).cpu()
            if not bool(self.norms.isfinite().all()):
                return Status.non_finite
            if bool((self.norms <= self.target).all()):
                return Status.converged
            worst = float(_relative(self.norms, self.norm_b).max())
            idle = 0 if best is None or worst < 0.7 * best else idle + 1
            best = worst if best is None else min(best, worst)
            if idle >= PATIENCE:
                return Status.stagnated
            if self.iterations >= self.limit:
                return Status.iteration_limit
            status = self._descend(callback, start)
            if status is not None:
                self.norms = (self.b - self.exact(self.x) - self.damping * self.x).norm(dim=0).cpu()
                return status

    def _descend(
        self, callback: Callable[[int, float, float], Any] | None, start: float
    ) -> Status | None:
        """Iterate until the recurred residual is small enough, or for the last time allowed."""
        self.rz.zero_()  # the first direction is z alone
        self._turn(self.r if self.inverse is None else self.inverse(self.r), fresh=True)
        while self.iterations < self.limit:
            product = self.multiply(self.working).contiguous()
            self.kernels.cg_curvature(self.p, product, self.damping, self.curvature, *self.queue)
            self.kernels.cg_update(
                self.p,
                product,
                self.damping,
                self.curvature,
                self.rz,
                self.x,
                self.r,
                self.partial,
                self.negative,
                *self.queue,
            )
            self.iterations += 1
            if self.iterations % CHECK_EVERY == 0 or self.iterations == self.limit:
                norms = self.partial.sum(0).sqrt().cpu()  # the only wait
                worst = float(_relative(norms, self.norm_b).max())
                self.history.append(worst)
                if bool(self.negative.any()):
                    return Status.indefinite
                if callback is not None:
                    seconds = time.perf_counter() - start
                    if callback(self.iterations, worst, seconds) is False:
                        return Status.interrupted
                if not bool((norms > 0.5 * self.target).any()) or not norms.isfinite().all():
                    return None
            self._turn(self.r if self.inverse is None else self.inverse(self.r), fresh=False)
        return None

    def _turn(self, z: Tensor, fresh: bool) -> None:
        """Make the next direction of ``z``, the preconditioned residual."""
        z = z.double().contiguous()
        if fresh or self.inverse is not None:
            self.kernels.cg_curvature(self.r, z, 0.0, self.partial, *self.queue)
        self.kernels.cg_direction(
            z, self.partial, self.rz, self.next_rz, self.p, self.working, *self.queue
        )
        self.rz, self.next_rz = self.next_rz, self.rz
