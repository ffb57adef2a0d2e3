"""MINRES on a GPU: symmetric systems, indefinite ones too.

Paige & Saunders 1975, SIAM J. Numer. Anal. 12; the residual never grows. Columns go side by side,
with scalars of their own on the device; the host looks at them every few iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacpot.linalg.cuda_cg import is_due
from jacpot.linalg.cuda_refine import Solver, exact_product, over
from jacpot.linalg.solution import Status

__all__ = ["MinimalResidual"]

ROUNDING = torch.finfo(torch.float64).eps


class MinimalResidual(Solver):
    """``(A + damping·I) x = b`` for symmetric A, preconditioned by a positive definite M⁻¹."""

    norm_a: Tensor | None = None  # (R,): what the iterations have seen of it, on the CPU

    def residual(self) -> bool:
        """See `Solver`."""
        self.r = self.b - self._exact(self.x)
        self.norms = self.r.norm(dim=0).cpu()
        z = self.precondition(self.r)
        size, normal = z.norm(dim=0).cpu(), self._exact(z).norm(dim=0).cpu()
        seen = torch.where(size > 0, normal / size, 0.0)
        self.norm_a = seen if self.norm_a is None else torch.maximum(self.norm_a, seen)
        unit = torch.finfo(self.a.double().dtype).eps
        self.in_null_space = (size > 0) & (normal <= unit**0.5 * self.norm_a * size)
        return bool((self.norms <= self.target).all())

    def hopeless(self) -> Status | None:
        """See `Solver`: what the operator takes to zero is outside its range."""
        outside = self.in_null_space & (self.norms > self.target)
        return Status.inconsistent if bool(outside.any()) else None

    def _exact(self, x: Tensor) -> Tensor:
        return exact_product(self.a, x) + self.damping * x

    def descend(self) -> Status | None:
        """See `Solver`."""
        enough = torch.maximum(0.5 * self.target, self.floor * self.norms)
        y, z = self.r, self.precondition(self.r)
        square = (y * z).sum(0)
        bad = (square < 0).any()
        beta = square.clamp_min(0).sqrt()
        # Of the residual's norm over its length for M⁻¹, which is what the recurrence knows.
        plain = over(self.norms.to(beta.device), beta)
        x, before, w, w_before = (torch.zeros_like(y) for _ in range(4))
        zero = torch.zeros_like(beta)
        phibar, largest, unit = beta, zero, 10 * torch.finfo(self.a.dtype).eps
        dbar, epsilon, c, s = zero, zero, zero - 1, zero
        # Columns that no direction is left for; all that comes of them is zero from then on.
        ended = beta == 0
        status, first = None, self.iterations
        while self.iterations < self.limit:
            self.iterations += 1
            v, p = over(z, beta), over(y, beta)
            y = self.multiply(v)
            if self.damping:
                y = y.add(v, alpha=self.damping)
            alpha = (v * y).sum(0)
            y = y - alpha * p - beta * before
            before = p
            z = self.precondition(y)
            square = (y * z).sum(0)
            bad |= (square < -unit * largest**2).any()
            beta = square.clamp_min(0).sqrt()
            largest = torch.maximum(largest, torch.hypot(alpha, beta))

            epsilon_before, delta = epsilon, c * dbar + s * alpha
            gbar = s * dbar - c * alpha
            epsilon, dbar = s * beta, -c * beta
            normal, gamma = phibar * torch.hypot(gbar, dbar), torch.hypot(gbar, beta)
            ended = ended | (gamma <= unit * largest)  # singular along v
            c, s = over(gbar, gamma), over(beta, gamma)
            phi = torch.where(ended, zero, c * phibar)
            phibar = torch.where(ended, phibar, s * phibar)
            w_before, w = w, over(v - epsilon_before * w_before - delta * w, gamma)
            x += torch.where(ended, zero, phi * w)
            ended = ended | (normal <= unit * largest * phibar) | (beta <= ROUNDING * largest)
            beta = torch.where(ended, zero, beta)
            if not is_due(self.iterations - first) and self.iterations < self.limit:
                continue
            flags = ended.to(beta), bad.to(beta).expand_as(beta)
            # The only wait:
            norms, over_with, negative = torch.stack([plain * phibar, *flags]).cpu()
            if bool(negative.any()):
                return Status.preconditioner
            status = self.report(float(self.relative(norms).max()))
            done = (norms <= enough) | (over_with > 0)
            if status is not None or bool(done.all()) or not bool(norms.isfinite().all()):
                break
        if bool(x.isfinite().all()):
            self.x += x
        return status
