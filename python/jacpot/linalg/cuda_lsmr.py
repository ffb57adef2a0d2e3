"""LSMR on a GPU: least squares and least norm for an operator of any shape.

Fong & Saunders 2011, "LSMR: an iterative algorithm for sparse least-squares problems". Damping is
an identity stacked below A. Columns go side by side, with scalars of their own on the device; the
host looks at them every few iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacpot.linalg.cuda_cg import is_due
from jacpot.linalg.cuda_refine import Solver, exact_product
from jacpot.linalg.solution import Status

__all__ = ["LeastSquares"]


def _over(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, zero where a column is done and b is zero."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, 1.0, b))


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
        self.u, self.v = r, normal
        self.norms, self.normal = r.norm(dim=0).cpu(), normal.norm(dim=0).cpu()
        seen = torch.where(self.norms > 0, self.normal / self.norms, 0.0)
        self.norm_a = seen if self.norm_a is None else torch.maximum(self.norm_a, seen)
        met = (self.norms <= self.target) | (self.normal <= self.tol * self.norm_a * self.norms)
        return bool(met.all())

    def measure(self) -> float:
        """See `Solver`."""
        return float(self.normal.max()) if len(self.normal) else 0.0

    def descend(self) -> Status | None:
        """See `Solver`."""
        beta, normal = self.u.norm(dim=0), self.v.norm(dim=0)
        alpha = _over(normal, beta)
        u, v = _over(self.u, beta), _over(self.v, normal)
        h, hbar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        zetabar, alphabar, rho, rhobar, cbar, sbar = alpha * beta, alpha, one, one, one, zero
        betadd, betad, rhod, tautilde, thetatilde, zeta = beta, zero, one, zero, zero, zero
        norm_a = torch.as_tensor(self.norm_a, dtype=torch.float64).to(beta.device)
        status, first = None, self.iterations
        while self.iterations < self.limit:
            self.iterations += 1
            u = self._forward(v) - alpha * u
            beta = u.norm(dim=0)
            u = _over(u, beta)
            v = self._backward(u) - beta * v
            alpha = v.norm(dim=0)
            v = _over(v, alpha)
            norm_a = torch.maximum(norm_a, torch.hypot(alpha, beta))

            rho_old, rhobar_old, zeta_old = rho, rhobar, zeta
            rho = torch.hypot(alphabar, beta)
            c, s = _over(alphabar, rho), _over(beta, rho)
            theta, alphabar = s * alpha, c * alpha
            thetabar = sbar * rho
            rhobar = torch.hypot(cbar * rho, theta)
            cbar, sbar = _over(cbar * rho, rhobar), _over(theta, rhobar)
            zeta, zetabar = cbar * zetabar, -sbar * zetabar
            hbar = h - _over(thetabar * rho, rho_old * rhobar_old) * hbar
            x += _over(zeta, rho * rhobar) * hbar
            h = v - _over(theta, rho) * h

            betahat, betadd = c * betadd, -s * betadd
            thetatilde_old, rhotilde = thetatilde, torch.hypot(rhod, thetabar)
            ctilde, stilde = _over(rhod, rhotilde), _over(thetabar, rhotilde)
            thetatilde, rhod = stilde * rhobar, ctilde * rhobar
            betad = ctilde * betahat - stilde * betad
            tautilde = _over(zeta_old - thetatilde_old * tautilde, rhotilde)
            taud = _over(zeta - thetatilde * tautilde, rhod)
            if not is_due(self.iterations - first) and self.iterations < self.limit:
                continue
            seen = torch.stack(
                [torch.hypot(betad - taud, betadd), zetabar.abs(), norm_a, alpha * beta]
            ).cpu()  # the only wait
            norms, normals, self.norm_a, moving = seen.unbind()
            size = torch.minimum(
                self.relative(norms), torch.where(norms > 0, normals / (self.norm_a * norms), 0.0)
            )
            status = self.report(float(size.max()))
            # A little below the target, so that the recomputed residual passes.
            done = (norms <= 0.5 * self.target) | (normals <= self.floor * self.normal)
            done |= (normals <= 0.5 * self.tol * self.norm_a * norms) | (moving == 0)
            done |= norms <= self.floor * self.norms
            if status is not None or bool(done.all()) or not bool(seen.isfinite().all()):
                break
        if bool(x.isfinite().all()):
            self.x += x
        return status
