"""The linearized network as a Gaussian process: ``Δ ~ N(0, I)``, ``y = f0 + J Δ + noise``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg import Solution, solve
from jacpot.linalg.arguments import check_count
from jacpot.linalg.prepare import prepare
from jacpot.tangent.jacobian import Jacobian
from jacpot.tangent.operators import JacobianOperator, KernelOperator
from jacpot.tangent.preconditioners import Auto

__all__ = ["Posterior"]


class Posterior:
    """Exact predictive variances and samples. Made by `Fit.posterior`.

    Everything is a ridge system with several right-hand sides, solved by preconditioned CG; the
    preconditioner is made once. A solve that does not converge raises `SolverError`.
    """

    def __init__(
        self,
        capture: Callable[[Tensor], Jacobian],
        delta: Callable[[Tensor], dict[str, Tensor]],
        jacobian: JacobianOperator,
        residual: Tensor,
        noise: float,
    ) -> None:
        self._capture, self._delta, self._jacobian = capture, delta, jacobian
        self._residual, self.noise = residual.reshape(-1), noise
        self._kernel = KernelOperator(jacobian)
        self._preconditioner = prepare(Auto(), self._kernel, noise)

    def covariance(self, x: Tensor, tol: float = 1e-8) -> Tensor:
        """Predictive covariance of the noiseless outputs, ``Θ** - Θ* (Θ + noise·I)⁻¹ Θ*ᵀ``.

        Parameters
        ----------
        x
            Inputs (M, ...).
        tol
            Of the solves.

        Returns
        -------
        Tensor
            (M, K, K) float64: each input's own.
        """
        other = self._capture(x)
        new = JacobianOperator(other.blocks, other.n_examples, other.n_outputs).double()
        m, k = other.n_examples, other.n_outputs
        dense = new.dense()  # (M·K, P)
        cross = self._jacobian.double() @ dense.T
        weights = self._solve(cross, tol).x
        prior = torch.einsum("mkp,mlp->mkl", *(dense.reshape(m, k, dense.shape[1]),) * 2)
        columns = (t.reshape(len(cross), m, k) for t in (cross, weights))
        known = torch.einsum("nmk,nml->mkl", *columns)
        return prior - known

    def variance(self, x: Tensor, tol: float = 1e-8) -> Tensor:
        """Predictive variances (M, K) of the noiseless outputs."""
        return self.covariance(x, tol).diagonal(dim1=1, dim2=2).clamp_min(0)

    def sample(self, count: int, seed: int = 0, tol: float = 1e-6) -> list[dict[str, Tensor]]:
        """Draw Δ from the posterior: sample, then optimise (Matthews et al. 2017).

        Each draw fits ``y - noise sample`` starting from a prior sample; all draws are right-hand
        sides of one solve.

        Parameters
        ----------
        count
            Number of draws, at least zero.
        seed
            Of the prior and noise samples.
        tol
            Of the solve.

        Returns
        -------
        list of dict
            Δ by parameter name, for `LinearizedModule.set_delta`.
        """
        check_count("count", count)
        generator = torch.Generator().manual_seed(seed)
        exact = self._jacobian.double()
        rows, columns = exact.shape
        options: dict[str, Any] = {
            "generator": generator,
            "dtype": torch.float64,
            "device": "cpu",
        }
        # Drawn on the CPU, so that a seed means the same on every device.
        prior = torch.randn(columns, count, **options).to(exact.device)
        noise = torch.randn(rows, count, **options).to(exact.device) * self.noise**0.5
        alpha = self._solve(self._residual[:, None] - exact @ prior - noise, tol).x
        draws = prior + exact.T @ alpha
        return [self._delta(draw) for draw in draws.unbind(1)]

    def _solve(self, rhs: Tensor, tol: float) -> Solution:
        solution = solve(
            self._kernel,
            rhs,
            damping=self.noise,
            method="cg",
            tol=tol,
            preconditioner=self._preconditioner,
        )
        return solution.raise_if_failed()
