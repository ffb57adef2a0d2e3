"""What a fit solves: ``min Σ w·loss(f0 + J Δ, y) + ridge/2 ‖Δ‖²``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg import Solution
from jacpot.tangent.jacobian import Jacobian
from jacpot.tangent.losses import Loss, Weighted, flat_targets, get_loss
from jacpot.tangent.network import Inputs, n_examples, take
from jacpot.tangent.newton import fit_convex
from jacpot.tangent.operators import JacobianOperator
from jacpot.tangent.preconditioners.named import named
from jacpot.tangent.squared import fit_squared
from jacpot.tangent.streamed import StreamedJacobian

__all__ = ["Problem", "pose"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A fit's linear algebra around θ0. Made by :func:`pose`.

    Attributes
    ----------
    columns : Jacobian
        Of one example or more: turns vectors in the order of the blocks into parameters.
    capture : callable
        Gives the Jacobian at other inputs.
    unweighted : JacobianOperator
        J (N·K, P).
    outputs : Tensor
        f0 (N, K) in float64.
    targets : Tensor
        As the loss wants them.
    loss : str
        Its name.
    objective : Loss
        With the examples' weights.
    roots : Tensor or None
        Roots of the examples' weights (N,).
    ridge : float
    """

    columns: Jacobian
    capture: Callable[[Inputs], Jacobian]
    unweighted: JacobianOperator
    outputs: Tensor
    targets: Tensor
    loss: str
    objective: Loss
    roots: Tensor | None
    ridge: float = 0.0

    @cached_property
    def jacobian(self) -> JacobianOperator:
        """J; for the squared loss with rows times the roots of the examples' weights."""
        if self.roots is None or self.loss != "mse":
            return self.unweighted
        return self.unweighted.weighted(self.roots)

    @cached_property
    def errors(self) -> Tensor:
        """``y - f0`` (N, K) in float64, for the squared loss."""
        return self.targets - self.outputs

    @cached_property
    def residual(self) -> Tensor:
        """The same times the roots of the examples' weights."""
        return self.errors if self.roots is None else self.errors * self.roots[:, None]

    def flat(self, x: Tensor) -> Tensor:
        """From the order of the blocks to that of the Jacobian's columns."""
        if not self.jacobian.blocks:
            return x
        return self.columns.from_blocks(torch.split(x, self.jacobian.sizes))

    def by_blocks(self, flat: Tensor) -> Tensor:
        """From the order of the Jacobian's columns to that of the blocks."""
        parts = self.columns.to_blocks(flat)
        return torch.cat(parts) if parts else flat

    def delta(self, x: Tensor) -> dict[str, Tensor]:
        """Give tensors by parameter name from a vector in the order of the blocks."""
        return self.columns.unflatten(self.flat(x).to(self.jacobian.own_dtype))

    def solve(
        self,
        method: str,
        preconditioner: Any,
        tol: float,
        max_iter: int | None,
        callback: Callable[[int, float, float], Any] | None,
        start: Tensor | None,
    ) -> Solution:
        """Solve for Δ, in the order of the blocks: see `LinearizedModule.fit`."""
        how = (self.ridge, method, named(preconditioner), tol, max_iter, callback, start)
        if self.loss == "mse":
            return fit_squared(self.jacobian, self.residual, *how)
        if self.ridge == 0:
            raise ValueError(f"argument 'ridge' must be above 0 for loss {self.loss!r}")
        return fit_convex(self.jacobian, self.outputs, self.targets, self.objective, *how)


def pose(
    capture: Callable[[Inputs], Jacobian],
    x: Inputs,
    y: Tensor,
    loss: str | Loss,
    weights: Tensor | None,
    batch_size: int | None,
) -> Problem:
    """Evaluate the network at the training inputs, and check the targets against it.

    Parameters
    ----------
    capture
        Gives the Jacobian at inputs.
    x, y, loss, weights, batch_size
        As in `LinearizedModule.fit`.
    """
    objective = get_loss(loss)
    n = n_examples(x)
    if batch_size is None or n == 0:
        columns = capture(x)
        outputs = columns.outputs
        operator = JacobianOperator(columns.blocks, n, columns.n_outputs, device=outputs.device)
    else:
        operator = StreamedJacobian(capture, x, batch_size)
        columns = capture(take(x, slice(1)))
        batches = [slice(at, at + batch_size) for at in range(0, n, batch_size)]
        outputs = torch.cat([capture(take(x, batch)).outputs for batch in batches])
    targets = objective.check(flat_targets(y, outputs, columns.output_shape), outputs)
    roots = _roots(weights, n)
    return Problem(
        columns,
        capture,
        operator,
        outputs.double(),
        targets,
        loss if isinstance(loss, str) else type(loss).__name__,
        objective if roots is None else Weighted(objective, roots.square()),
        roots,
    )


def _roots(weights: Tensor | None, n: int) -> Tensor | None:
    """Roots of the examples' weights, float64."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (n,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"argument 'weights' must be a tensor of shape ({n},), got {got}")
    if not (torch.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("argument 'weights' must be finite and at least 0")
    return weights.detach().double().sqrt()
