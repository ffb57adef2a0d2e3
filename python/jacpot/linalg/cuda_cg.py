"""Conjugate gradients on a GPU that hardly ever wait.

Scalars of the recurrences stay on the device: one for each column, of which all share the products.
The host looks at the residual every few iterations only. An iteration is recorded into a CUDA graph
and replayed, where the operator and the preconditioner allow it.
"""

from __future__ import annotations

from typing import Any

import torch

from jacpot import _backend
from jacpot.linalg.cuda_graph import Replayed
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
        b, inverse = self.b, self.inverse
        self.kernels = _backend.cuda()
        blocks = self.kernels.cg_blocks(*b.shape, _backend.queue(b)[0])
        self.curvature, self.partial = (b.new_empty(blocks, b.shape[1]) for _ in range(2))
        self.rz, self.next_rz = b.new_zeros(b.shape[1]), b.new_zeros(b.shape[1])
        self.negative = torch.zeros(b.shape[1], dtype=torch.int32, device=b.device)
        self.p, self.working = torch.zeros_like(b), torch.zeros_like(b, dtype=self.a.dtype)
        self.r = torch.empty_like(b)
        replayable = self.a.replayable and (inverse is None or inverse.replayable)
        self.replayed = Replayed(b.device, replayable)

    def residual(self) -> bool:
        """See `Solver`."""
        torch.sub(self.b, exact_product(self.a, self.x), out=self.r)
        self.r.sub_(self.x, alpha=self.damping)
        self.norms = self.r.norm(dim=0).cpu()
        return bool((self.norms <= self.target).all())

    def descend(self) -> Status | None:
        """See `Solver`."""
        enough = torch.maximum(0.5 * self.target, self.floor * self.norms)
        self.rz.zero_()  # the first direction is the preconditioned residual alone
        if self.inverse is None:
            self.kernels.cg_curvature(self.r, self.r, 0.0, self.partial, *_backend.queue(self.b))
        first = self.iterations
        while self.iterations < self.limit:
            self.replayed(self._step)
            self.products += 1
            self.iterations += 1
            if is_due(self.iterations - first) or self.iterations == self.limit:
                seen = torch.stack([self.partial.sum(0).sqrt(), self.negative.double()])
                norms, negative = seen.cpu()  # the only wait
                status = self.report(float(self.relative(norms).max()))
                if bool(negative.any()):
                    return Status.indefinite
                if status is not None:
                    return status
                if not bool((norms > enough).any()) or not norms.isfinite().all():
                    return None
        return None

    def _step(self) -> None:
        """Find the next direction and go along it: always the same work on the same memory."""
        kernels, queue = self.kernels, _backend.queue(self.b)
        z = self.precondition(self.r)
        if self.inverse is not None:  # else these are the sums that the step before left
            kernels.cg_curvature(self.r, z, 0.0, self.partial, *queue)
        kernels.cg_direction(z, self.partial, self.rz, self.next_rz, self.p, self.working, *queue)
        self.rz.copy_(self.next_rz)
        product = self.a._matmat(self.working).contiguous()
        kernels.cg_curvature(self.p, product, self.damping, self.curvature, *queue)
        kernels.cg_update(
            self.p,
            product,
            self.damping,
            self.curvature,
            self.rz,
            self.x,
            self.r,
            self.partial,
            self.negative,
            *queue,
        )
