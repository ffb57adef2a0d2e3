"""LSMR on a GPU: least squares and least norm for an operator of any shape.

Fong & Saunders 2011, "LSMR: an iterative algorithm for sparse least-squares problems". Damping is
an identity stacked below A, and a preconditioner the inner product of the right vectors, as in the
compiled solver. Columns go side by side, with scalars of their own on the device; the host looks at
them every few iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacpot.linalg.cuda_cg import is_due
from jacpot.linalg.cuda_refine import Solver, exact_product, over
from jacpot.linalg.solution import Status

__all__ = ["LeastSquares"]


class LeastSquares(Solver):
    """``min ‖A x − b‖² + damping·‖x‖²``; of all minimisers the one of least norm."""

    norm_a: Tensor | None = None  # (R,): what the iterations have seen of it, on the CPU

    def _forward(self, x: Tensor) -> Tensor:
        top = self.multiply(x)
        return torch.cat([top, self.damping**0.5 * x]) if self.damping else top

    def _backward(self, u: Tensor) -> Tensor:
        self.products += 1
        rows = self.a.shape[0]
        out = self.a.T._matmat(u[:rows].to(self.a.dtype).contiguous()).double()
        return out.add(u[rows:], alpha=self.damping**0.5) if self.damping else out

    def residual(self) -> bool:
        """See `Solver`."""
        r = self.b - exact_product(self.a, self.x)
        exact = self.a.double().T
        normal = exact._matmat(r.to(exact.dtype)).double()
        if self.damping:
            r = torch.cat([r, -(self.damping**0.5) * self.x])
            normal = normal.sub(self.x, alpha=self.damping)
        self.u, self.p, self.v = r, normal, self.precondition(normal)
        self.norms, self.normal = r.norm(dim=0).cpu(), normal.norm(dim=0).cpu()
        self.length = (self.p * self.v).sum(0)
        seen = torch.where(self.norms > 0, self.normal / self.norms, 0.0)
        self.norm_a = seen if self.norm_a is None else torch.maximum(self.norm_a, seen)
        met = (self.norms <= self.target) | (self.normal <= self.tol * self.norm_a * self.norms)
        return bool(met.all())

    def measure(self) -> float:
        """See `Solver`."""
        return float(self.length.max()) ** 0.5 if len(self.length) else 0.0

    def descend(self) -> Status | None:
        """See `Solver`."""
        if not bool((self.length >= 0).all()):
            return Status.preconditioner
        beta, length = self.u.norm(dim=0), self.length.sqrt()
        alpha = over(length, beta)
        u, p, v = over(self.u, beta), over(self.p, length), over(self.v, length)
        first_length = length.cpu()
        plain = torch.where(first_length > 0, self.normal / first_length, 0.0)
        # With a preconditioner the plain norm is an estimate: too short a cycle would be in vain.
        least = torch.inf if self.inverse is None else 0.1 * first_length
        h, hbar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        zetabar, alphabar, rho, rhobar, cbar, sbar = alpha * beta, alpha, one, one, one, zero
        betadd, betad, rhod, tautilde, thetatilde, zeta = beta, zero, one, zero, zero, zero
        norm_a = torch.as_tensor(self.norm_a, dtype=torch.float64).to(beta.device)
        status, first = None, self.iterations
        while self.iterations < self.limit:
            self.iterations += 1
            size, alpha_before = v.norm(dim=0), alpha
            u = self._forward(v) - alpha * u
            beta = u.norm(dim=0)
            u = over(u, beta)
            p = self._backward(u) - beta * p
            v = self.precondition(p)
            square = (p * v).sum(0)
            alpha = square.sqrt()  # NaN where the preconditioner is not positive definite
            p, v = over(p, alpha), over(v, alpha)
            norm_a = torch.maximum(norm_a, over(torch.hypot(alpha_before, beta), size))

            rho_old, rhobar_old, zeta_old = rho, rhobar, zeta
            rho = torch.hypot(alphabar, beta)
            c, s = over(alphabar, rho), over(beta, rho)
            theta, alphabar = s * alpha, c * alpha
            thetabar = sbar * rho
            rhobar = torch.hypot(cbar * rho, theta)
            cbar, sbar = over(cbar * rho, rhobar), over(theta, rhobar)
            zeta, zetabar = cbar * zetabar, -sbar * zetabar
            hbar = h - over(thetabar * rho, rho_old * rhobar_old) * hbar
            x += over(zeta, rho * rhobar) * hbar
            h = v - over(theta, rho) * h

            betahat, betadd = c * betadd, -s * betadd
            thetatilde_old, rhotilde = thetatilde, torch.hypot(rhod, thetabar)
            ctilde, stilde = over(rhod, rhotilde), over(thetabar, rhotilde)
            thetatilde, rhod = stilde * rhobar, ctilde * rhobar
            betad = ctilde * betahat - stilde * betad
            tautilde = over(zeta_old - thetatilde_old * tautilde, rhotilde)
            taud = over(zeta - thetatilde * tautilde, rhod)
            if not is_due(self.iterations - first) and self.iterations < self.limit:
                continue
            seen = torch.stack(
                [torch.hypot(betad - taud, betadd), zetabar.abs(), norm_a, alpha * beta, square]
            ).cpu()  # the only wait
            norms, lengths, self.norm_a, moving, square = seen.unbind()
            if bool((square < 0).any()):
                return Status.preconditioner
            pulled = torch.where(norms > 0, plain * lengths / (self.norm_a * norms), 0.0)
            status = self.report(float(torch.minimum(self.relative(norms), pulled).max()))
            # A little below the target, so that the recomputed residual passes.
            done = (norms <= 0.5 * self.target) | (lengths <= self.floor * first_length)
            done |= ((pulled <= 0.5 * self.tol) & (lengths <= least)) | (moving == 0)
            done |= norms <= self.floor * self.norms
            if status is not None or bool(done.all()) or not bool(seen.isfinite().all()):
                break
        if bool(x.isfinite().all()):
            self.x += x
        return status
