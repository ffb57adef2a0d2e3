"""Block conjugate gradients on a GPU: one search space for all right-hand sides.

Dubrulle's BCGrQ (2001): residuals are kept as R = Q·C with Q orthonormal in the preconditioner's
inner product. Small matrices (R, R) are factored on the host, which waits for two of them an
iteration; all that is of the size of the system stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacpot.linalg.cuda_refine import Solver, exact_product
from jacpot.linalg.solution import Status

__all__ = ["BlockConjugateGradients"]

DEPENDENT = 1e-14  # share of the largest eigenvalue that counts as nothing new


class BlockConjugateGradients(Solver):
    """``(A + damping·I) x = b`` for symmetric positive definite A, columns together."""

    def residual(self) -> bool:
        """See `Solver`."""
        self.r = self.b - exact_product(self.a, self.x) - self.damping * self.x
        self.norms = self.r.norm(dim=0).cpu()
        return bool((self.norms <= self.target).all())

    def descend(self) -> Status | None:
        """See `Solver`."""
        enough = torch.maximum(0.5 * self.target, self.floor * self.norms)
        # Unit columns: small and large residuals count alike in what is dependent.
        scale = torch.where(self.norms > 0, self.norms, 1.0)
        basis = _Basis.of(self, self.r / scale.to(self.r.device))
        if basis is None:
            return Status.preconditioner
        coefficients = basis.zeta * self.norms  # exactly zero for what is solved exactly
        s = basis.z
        while self.iterations < self.limit:
            product = self.multiply(s)
            if self.damping:
                product = product.add(s, alpha=self.damping)
            curvature = (s.T @ product).cpu()
            if not bool(curvature.isfinite().all()):
                return None
            values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
            if len(values) and float(values[0]) < -DEPENDENT * float(values.abs().max()):
                return Status.indefinite
            kept = values > DEPENDENT * values[-1:].clamp_min(0)
            inverse = torch.where(kept, 1 / values, 0.0)
            step = (vectors * inverse) @ vectors.T
            self.x.addmm_(s, (step @ coefficients).to(s.device))
            turned = _Basis.of(self, torch.addmm(basis.q, product, step.to(s.device), alpha=-1))
            self.iterations += 1
            if turned is None:
                return Status.preconditioner
            basis = turned
            coefficients = basis.zeta @ coefficients
            half = basis.squares @ coefficients
            norms = (coefficients * half).sum(0).clamp_min(0).sqrt()
            status = self.report(float(self.relative(norms).max()))
            if status is not None:
                return status
            if not bool((norms > enough).any()) or not norms.isfinite().all():
                return None
            s = torch.addmm(basis.z, s, basis.zeta.T.to(s.device))
        return None


class _Basis:
    """Q and Z = M⁻¹Q with QᵀZ = I, and ζ with Q·ζ what they were made of.

    Directions that are dependent to rounding are columns of zeros, so that widths never change.
    """

    def __init__(self, q: Tensor, z: Tensor, zeta: Tensor, squares: Tensor) -> None:
        self.q, self.z, self.zeta, self.squares = q, z, zeta, squares

    @classmethod
    def of(cls, solver: Solver, w: Tensor) -> _Basis | None:
        """Orthonormalise the columns of ``w``; None where M is not positive definite."""
        q, z = w, solver.precondition(w)
        zeta = torch.eye(w.shape[1], dtype=torch.float64)
        for _ in range(2):  # the second for orthogonality to rounding
            h = (q.T @ z).cpu()
            if not bool(h.isfinite().all()):
                # What is not finite is seen in the recomputed residual.
                return cls(q, z, zeta, h)
            values, vectors = torch.linalg.eigh((h + h.T) / 2)
            if len(values) and float(values[0]) < -1e-8 * float(values.abs().max()):
                return None
            kept = values > DEPENDENT * values[-1:].clamp_min(0)
            root = torch.where(kept, values, 1.0).sqrt()
            turn = (vectors * torch.where(kept, 1 / root, 0.0)).to(w.device)
            q, z = q @ turn, z @ turn
            zeta = (torch.where(kept, root, 0.0)[:, None] * vectors.T) @ zeta
        return cls(q, z, zeta, (q.T @ q).cpu() if solver.inverse is not None else (q.T @ z).cpu())
