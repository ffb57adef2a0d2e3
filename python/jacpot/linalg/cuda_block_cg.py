"""Block conjugate gradients on a GPU: one search space for all right-hand sides.

Dubrulle's BCGrQ (2001): residuals are kept as R = Q·C with Q orthonormal in the preconditioner's
inner product. The small matrices (R, R) are factored on the device too, so that an iteration waits
for nothing, can be replayed as a CUDA graph, and is looked at every few times only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.linalg.cuda_cg import is_due
from jacpot.linalg.cuda_graph import Replayed
from jacpot.linalg.cuda_refine import Solver, exact_product
from jacpot.linalg.solution import Status

__all__ = ["BlockConjugateGradients"]

DEPENDENT = 1e-14  # share of the largest eigenvalue that counts as nothing new
NEGATIVE = 1e-8  # share of it that rounding does not explain, of a preconditioner in its own dtype


class BlockConjugateGradients(Solver):
    """``(A + damping·I) x = b`` for symmetric positive definite A, columns together."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        b, inverse = self.b, self.inverse
        columns = b.shape[1]
        self.small = columns <= _backend.cuda().eigen_limit(_backend.queue(b)[0])
        self.q, self.z, self.s = (torch.empty_like(b) for _ in range(3))
        # R = Q·C; the squares QᵀQ give its norms.
        self.coefficients, self.squares = (b.new_empty(columns, columns) for _ in range(2))
        self.indefinite, self.bad_inverse = (
            torch.zeros((), dtype=torch.bool, device=b.device) for _ in range(2)
        )
        replayable = self.a.replayable and (inverse is None or inverse.replayable)
        self.replayed = Replayed(b.device, replayable and self.small)

    def residual(self) -> bool:
        """See `Solver`."""
        self.r = self.b - exact_product(self.a, self.x) - self.damping * self.x
        self.norms = self.r.norm(dim=0).cpu()
        return bool((self.norms <= self.target).all())

    def descend(self) -> Status | None:
        """See `Solver`."""
        enough = torch.maximum(0.5 * self.target, self.floor * self.norms)
        # Unit columns: small and large residuals count alike in what is dependent.
        scale = torch.where(self.norms > 0, self.norms, 1.0).to(self.r.device)
        zeta = self._orthonormalise(self.r / scale)
        # Exactly zero for what is solved exactly.
        self.coefficients.copy_(zeta * self.norms.to(zeta.device))
        self.s.copy_(self.z)
        first = self.iterations
        while self.iterations < self.limit:
            self.replayed(self._step)
            self.products += 1
            self.iterations += 1
            if not is_due(self.iterations - first) and self.iterations < self.limit:
                continue
            half = self.squares @ self.coefficients
            norms = (self.coefficients * half).sum(0).clamp_min(0).sqrt()
            flags = [f.double().expand_as(norms) for f in (self.indefinite, self.bad_inverse)]
            norms, indefinite, bad_inverse = torch.stack([norms, *flags]).cpu()  # the only wait
            status = self.report(float(self.relative(norms).max()))
            if bool(indefinite.any()):
                return Status.indefinite
            if bool(bad_inverse.any()):
                return Status.preconditioner
            if status is not None:
                return status
            if not bool((norms > enough).any()) or not bool(norms.isfinite().all()):
                return None
        return None

    def _step(self) -> None:
        """Go along the search space and find the next: always the same work on the same memory."""
        s = self.s
        product = self.a._matmat(s.to(self.a.dtype)).double()
        if self.damping:
            product = product.add(s, alpha=self.damping)
        values, vectors = self._eigen(s.T @ product)
        # From what is not finite or not positive definite on, x stays as it is.
        self.indefinite.logical_or_(values.amin() < -DEPENDENT * values.abs().amax())
        kept = values > DEPENDENT * values.amax().clamp_min(0)
        step = (vectors * torch.where(kept, 1 / values, 0.0)) @ vectors.T
        along = s @ (step @ self.coefficients)
        sound = along.isfinite().all() & ~(self.indefinite | self.bad_inverse)
        self.x.add_(torch.where(sound, along, 0.0))
        zeta = self._orthonormalise(torch.addmm(self.q, product, step, alpha=-1))
        self.coefficients.copy_(zeta @ self.coefficients)
        self.s.copy_(torch.addmm(self.z, s, zeta.T))

    def _orthonormalise(self, w: Tensor) -> Tensor:
        """Set Q and Z = M⁻¹Q with QᵀZ = I, and give ζ with Q·ζ = w.

        Directions that are dependent to rounding are columns of zeros, so that widths never change.
        """
        q, z = w, self.precondition(w)
        zeta = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
        for _ in range(2):  # the second for orthogonality to rounding
            values, vectors = self._eigen(q.T @ z)
            self.bad_inverse.logical_or_(values.amin() < -NEGATIVE * values.abs().amax())
            kept = values > DEPENDENT * values.amax().clamp_min(0)
            root = torch.where(kept, values, 1.0).sqrt()
            turn = vectors * torch.where(kept, 1 / root, 0.0)
            q, z = q @ turn, z @ turn
            zeta = (torch.where(kept, root, 0.0)[:, None] * vectors.T) @ zeta
        self.q.copy_(q)
        self.z.copy_(z)
        self.squares.copy_(q.T @ q)
        return zeta

    def _eigen(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (R,), in no order, and vectors (R, R) of the symmetric part."""
        h = (h + h.T) / 2
        if not self.small:  # waits for the device, which then has much to do anyway
            values, vectors = torch.linalg.eigh(h)
            return values, vectors
        values, vectors = torch.empty_like(h[0]), torch.empty_like(h)
        _backend.cuda().eigen(h, values, vectors, *_backend.queue(h))
        return values, vectors
