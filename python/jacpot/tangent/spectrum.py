"""The tangent kernel's eigenvalues: one factorisation, every ridge and every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jacpot.linalg.arguments import check_number
from jacpot.tangent.operators import JacobianOperator, KernelOperator

__all__ = ["LIMIT", "Spectrum", "least"]

LIMIT = 20_000  # unknowns; the float64 eigenvectors take 3.2 GB there


def least(name: str, candidates: Sequence[float], score: Callable[[float], float]) -> float:
    """Give the candidate of least score, in whatever order they come."""
    if not candidates:
        raise ValueError(f"argument {name!r} must hold at least one value")
    scores = {candidate: score(candidate) for candidate in sorted(candidates)}
    usable = {c: value for c, value in scores.items() if not math.isnan(value)}
    if not usable:
        raise ValueError(f"argument {name!r} must hold a value whose score is a number")
    return min(usable, key=usable.__getitem__)


class Spectrum:
    """Eigenvalues λ and eigenvectors V of ``J Jᵀ`` in float64, with ``c = Vᵀ r``.

    Parameters
    ----------
    jacobian
        J (N·K, P), with N·K at most `LIMIT`.
    residual
        r (N·K,) float64.
    """

    def __init__(self, jacobian: JacobianOperator, residual: Tensor) -> None:
        size = jacobian.shape[0]
        if size > LIMIT:
            raise ValueError(
                f"the kernel's eigenvalues are found up to N·K = {LIMIT}, got N·K = {size}"
            )
        kernel = KernelOperator(jacobian).double().dense()
        values, self.vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
        self.values = values.clamp_min(0)
        self.residual = residual
        self.coefficients = self.vectors.T @ residual
        self.noise = (
            torch.finfo(jacobian.own_dtype).eps * size * float(self.values[-1]) if size else 0.0
        )

    def dual(self, ridge: float) -> Tensor:
        """α of the ridge fit; of the least-norm one when the ridge is zero."""
        return self._filter(self._inverse(ridge))

    def flow(self, time: float, ridge: float) -> Tensor:
        """α after gradient flow from zero: ``(1 - exp(-(λ + ridge) t)) / (λ + ridge) · c``."""
        if math.isinf(time):
            return self.dual(ridge)
        rates = self.values + ridge
        return self._filter(torch.where(rates > 0, -torch.expm1(-rates * time) / rates, time))

    def inverse_blocks(self, ridge: float, k: int) -> Tensor:
        """Diagonal blocks (N, K, K) of ``(J Jᵀ + ridge·I)⁻¹``."""
        vectors = self.vectors.reshape(-1, k, len(self.values))
        blocks: Tensor = (vectors * self._inverse(ridge)) @ vectors.mT
        return blocks

    def gcv(self, ridge: float) -> float:
        """Generalised cross-validation (Golub, Heath & Wahba 1979), of a ridge above zero."""
        kept = ridge / (self.values + ridge)  # eigenvalues of I - H
        misfit = (kept * self.coefficients).square().sum()
        return float(len(self.values) * misfit / kept.sum().square())

    def leave_one_out(self, ridge: float, k: int) -> Tensor:
        """Errors (N, K) of each example under the fit without it, all its outputs left out.

        Of rows that are weighted, they are weighted alike.
        """
        alpha = self.dual(ridge).reshape(-1, k)
        errors: Tensor = torch.linalg.solve(self.inverse_blocks(ridge, k), alpha)
        return errors

    def log_marginal_likelihood(self, ridge: float) -> float:
        """``log N(r; 0, J Jᵀ + ridge·I)``."""
        total = self.values + ridge
        fit = (self.coefficients.square() / total).sum()
        return float(-0.5 * (fit + total.log().sum() + len(total) * math.log(2 * math.pi)))

    def grid(self, count: int = 40) -> Tensor:
        """Ridges worth trying: from the noise to the largest eigenvalue, evenly in logarithm."""
        top = float(self.values[-1]) if len(self.values) else 1.0
        low = max(self.noise, 1e-10 * top) or 1e-10
        first, last = math.log10(low), math.log10(top or 1.0)
        return torch.logspace(first, last, count, dtype=torch.float64, device="cpu")

    def best(self, criterion: str, ridges: Sequence[float] | None, k: int) -> float:
        """Give the ridge above zero that minimises ``"gcv"``, ``"loo"`` or minus ``"evidence"``."""
        score = {
            "gcv": self.gcv,
            "loo": lambda ridge: float(self.leave_one_out(ridge, k).square().mean()),
            "evidence": lambda ridge: -self.log_marginal_likelihood(ridge),
        }[criterion]
        if ridges is None:
            ridges = self.grid().tolist()
        return least("ridges", [check_number("ridges", r, zero=False) for r in ridges], score)

    def _inverse(self, ridge: float) -> Tensor:
        if ridge > 0:
            inverse: Tensor = 1 / (self.values + ridge)
            return inverse
        return torch.where(self.values > self.noise, 1 / self.values, 0.0)

    def _filter(self, weights: Tensor) -> Tensor:
        alpha: Tensor = self.vectors @ (weights * self.coefficients)
        return alpha
