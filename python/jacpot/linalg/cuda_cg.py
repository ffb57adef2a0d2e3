"""Conjugate gradients on a GPU that hardly ever wait.

Scalars of the recurrences stay on the device: one for each column, of which all share the products.
The host looks at the residual every few iterations only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.linalg.cuda_refine import Solver, exact_product
from jacpot.linalg.solution import Status

__all__ = ["ConjugateGradients", "is_due"]

CHECK_EVERY = 8  # iterations between two looks at the residual


def is_due(iteration: int) -> bool:
    """Whether to look at the residual: often at first, where a good preconditioner is done."""
    return iteration in (1, 2, 4) or iteration % CHECK_EVERY == 0


class ConjugateGradients(Solver):
    """``(A + damping·I) x = b`` for symmetric positive definite A."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        b = self.b
        self.kernels, self.queue = _backend.cuda(), _backend.queue(b)
        blocks = self.kernels.cg_blocks(*b.shape, self.queue[0])
        self.curvature, self.partial = (b.new_empty(blocks, b.shape[1]) for _ in range(2))
        self.rz, self.next_rz = b.new_zeros(b.shape[1]), b.new_zeros(b.shape[1])
        self.negative = torch.zeros(b.shape[1], dtype=torch.int32, device=b.device)
        self.p, self.working = torch.zeros_like(b), torch.zeros_like(b, dtype=self.a.dtype)

    def residual(self) -> bool:
        """See `Solver`."""
        self.r = self.b - exact_product(self.a, self.x) - self.damping * self.x
        self.norms = self.r.norm(dim=0).cpu()
        return bool((self.norms <= self.target).all())

    def descend(self) -> Status | None:
        """See `Solver`."""
        enough = torch.maximum(0.5 * self.target, self.floor * self.norms)
        self.rz.zero_()  # the first direction is z alone
        self._turn(self.precondition(self.r), fresh=True)
        first = self.iterations
        while self.iterations < self.limit:
            self.products += 1
            product = self.a._matmat(self.working).contiguous()
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
            if is_due(self.iterations - first) or self.iterations == self.limit:
                norms = self.partial.sum(0).sqrt().cpu()  # the only wait
                status = self.report(float(self.relative(norms).max()))
                if bool(self.negative.any()):
                    return Status.indefinite
                if status is not None:
                    return status
                if not bool((norms > enough).any()) or not norms.isfinite().all():
                    return None
            self._turn(self.precondition(self.r), fresh=False)
        return None

    def _turn(self, z: Tensor, fresh: bool) -> None:
        """Make the next direction of ``z``, the preconditioned residual."""
        if fresh or self.inverse is not None:
            self.kernels.cg_curvature(self.r, z, 0.0, self.partial, *self.queue)
        self.kernels.cg_direction(
            z, self.partial, self.rz, self.next_rz, self.p, self.working, *self.queue
        )
        self.rz, self.next_rz = self.next_rz, self.rz
