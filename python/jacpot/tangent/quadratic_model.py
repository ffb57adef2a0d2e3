"""The quadratic model of a mean loss around the present weights, minimised in few directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jacpot.ops.jacobian import row_norms
from jacpot.tangent.factored import Jacobian
from jacpot.tangent.newton import newton_direction
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator
from jacpot.tangent.preconditioners import Auto, Kronecker

__all__ = ["QuadraticModel"]

DIRECT_SIZE = 2000  # systems of this size are factored exactly, in tens of milliseconds
DIRECT_TOL = 0.01
SAMPLE = 300  # examples that the Kronecker factors are made of; they only precondition
DEPENDENT = 1e-6  # share of a direction outside the subspace that is rounding


class QuadraticModel:
    """``m(d) = ⟨g, d⟩ + ½ dᵀ B d`` with the generalised Gauss-Newton matrix ``B = Jᵀ H J / N``.

    H holds the Hessians of the loss by the outputs (Schraudolph 2002). The gradient may be that of
    more examples than B (Byrd, Chin, Neveitt & Nocedal 2011). The directions that `widen` adds are
    kept with their images under J, so that minimising m over their span costs no product with J,
    whatever the damping.

    Parameters
    ----------
    columns
        J (N·K, P) at the present weights.
    root
        S (N, K, K), a root of each example's H, or of a matrix above it.
    gradient
        g by parameter name.
    value
        The loss at the present weights.
    above
        How far the loss lies above its tangent, on average over J's examples, where their outputs
        change by (N, K).
    generator
        Chooses the examples that the preconditioner is made of.

    Attributes
    ----------
    gradient : Tensor
        g (P,) in float64, in the order of the blocks of J, as all directions are.
    exact : bool
        Whether the system is small enough for `preconditioner` to solve it.
    """

    def __init__(
        self,
        columns: Jacobian,
        root: Tensor,
        gradient: Mapping[str, Tensor],
        value: float,
        above: Callable[[Tensor], float],
        generator: torch.Generator,
    ) -> None:
        self._columns, self.n, self.root, self.value = columns, columns.n_examples, root, value
        self._above = above
        self.operator = JacobianOperator(columns.blocks, self.n, columns.n_outputs)
        self.exact = min(self.operator.shape) <= DIRECT_SIZE
        self.gradient = torch.cat(columns.to_blocks(columns.flatten(gradient))).double()
        self._directions = self.gradient.new_empty(len(self.gradient), 0)  # orthonormal
        self._images = root.new_empty(self.operator.shape[0], 0)  # under J
        self._curvature = root.new_empty(0, 0)  # of B
        sample = torch.randperm(self.n, generator=generator, device="cpu")[:SAMPLE].to(root.device)
        part = JacobianOperator(self.operator.at(sample), len(sample), columns.n_outputs)
        self._sample = part.mixed(root[sample])

    def by_name(self, direction: Tensor) -> dict[str, Tensor]:
        """Give a direction (P,) by parameter name, in J's dtype."""
        parts = torch.split(direction.to(self.operator.dtype), self.operator.sizes)
        return self._columns.unflatten(self._columns.from_blocks(parts))

    def unit(self) -> float:
        """The size of B: what a damping is large or small against.

        That is the mean diagonal of ``Sᵀ J Jᵀ S``, here of a sample; or, where H vanishes at
        saturated outputs but the gradient does not, the curvature that keeps the model above zero.
        """
        diagonal = float(row_norms(self._sample.blocks).double().square().mean())
        return max(diagonal, float(self.gradient.square().sum()) / (2 * abs(self.value) or 1))

    def preconditioner(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Give ``r ↦ (B + damping·I)⁻¹ r``: exact for small systems, else by Kronecker factors."""
        if self.exact:
            return lambda r: newton_direction(
                self.operator, self.root, -self.n * r, self.n * damping, DIRECT_TOL, Auto(),
                precise=False,
            ).x  # fmt: skip
        count = self._sample.n_examples
        prepared = Kronecker().prepare(GaussNewtonOperator(self._sample), count * damping)
        inverse = prepared.inverse
        assert inverse is not None
        return lambda r: count * (inverse @ r.to(inverse.dtype)).double()

    def widen(self, direction: Tensor) -> None:
        """Add a direction (P,) to the subspace, unless it lies in it: one product with J."""
        direction = direction / direction.norm()
        for _ in range(2):  # Gram-Schmidt, twice is enough
            direction = direction - self._directions @ (self._directions.T @ direction)
        length = float(direction.norm())
        if not length > DEPENDENT:  # or not finite
            return
        direction = direction / length
        image = (self.operator @ direction).double()
        self._directions = torch.cat([self._directions, direction[:, None]], 1)
        self._images = torch.cat([self._images, image[:, None]], 1)
        row = self._images.T @ self._curved(image)
        size = len(row)
        grown = row.new_empty(size, size)
        grown[:-1, :-1] = self._curvature
        grown[-1], grown[:, -1] = row, row
        self._curvature = grown

    def minimise(self, damping: float) -> tuple[Tensor, float]:
        """Minimise ``m(d) + damping/2 ‖d‖²`` over the subspace; give d and the decrease of m."""
        weights, decrease = self._weigh(damping)
        return self._directions @ weights, decrease

    def step(self, damping: float) -> tuple[Tensor, float]:
        """Scale that d by the power of two that is best for the loss of the linearised network.

        Far from the minimum the parabola of a convex loss may say little about its course: that
        of an exponential tail ends where the loss has fallen by a factor of e.

        Returns
        -------
        direction, decrease
            The decrease is of the loss of the linearised network.
        """
        weights, _ = self._weigh(damping)
        direction, change = self._directions @ weights, (self._images @ weights).reshape(self.n, -1)
        slope, size = float(self.gradient @ direction), float(weights.square().sum())

        def value(length: float) -> float:
            return length * slope + self._above(length * change)

        length, best = 1.0, value(1.0) + 0.5 * damping * size
        for factor in (2.0, 0.5):
            while True:
                trial = factor * length
                after = value(trial) + 0.5 * damping * trial**2 * size
                if not after < best:
                    break
                length, best = trial, after
        return length * direction, 0.5 * damping * length**2 * size - best

    def residual(self, damping: float) -> Tensor:
        """``-g - (B + damping·I) d`` at that d: one product with Jᵀ."""
        weights, _ = self._weigh(damping)
        curved = (self.operator.T @ self._curved(self._images @ weights)).double()
        return -self.gradient - curved - damping * (self._directions @ weights)

    def _curved(self, image: Tensor) -> Tensor:
        """``H / N`` times a change of the outputs (N·K,)."""
        mixed = torch.einsum("nkl,nk->nl", self.root, image.reshape(self.n, -1))
        return torch.einsum("nkl,nl->nk", self.root, mixed).reshape(-1) / self.n

    def _weigh(self, damping: float) -> tuple[Tensor, float]:
        slopes, curvature = self._directions.T @ self.gradient, self._curvature
        weights = -torch.linalg.solve(
            curvature + damping * torch.eye(len(slopes), dtype=slopes.dtype, device=slopes.device),
            slopes,
        )
        return weights, -float(slopes @ weights + 0.5 * weights @ (curvature @ weights))
