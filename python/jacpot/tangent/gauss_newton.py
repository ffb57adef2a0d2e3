"""Generalised Gauss-Newton on the network itself, with Levenberg-Marquardt damping."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacpot.linalg import Status
from jacpot.tangent.batches import Batches
from jacpot.tangent.losses import Loss, get_loss
from jacpot.tangent.network import Inputs, Output, n_examples
from jacpot.tangent.objective import Evaluation, Objective
from jacpot.tangent.quadratic_model import QuadraticModel

__all__ = ["GaussNewton", "gauss_newton"]

FIRST_DAMPING = 0.01  # of the kernel's mean diagonal
INNER = 20  # iterations a step, at most, where they are not given
WORTH = 0.1  # share of the decrease that an inner iteration has to bring for another to follow
REJECTIONS = 20  # in a row, each with four times the damping, before it counts as stagnated
SHARE = 0.25  # of a step's effect that new examples have to see, else the batch is too small


@dataclass
class GaussNewton:
    """What :func:`gauss_newton` did.

    Attributes
    ----------
    status : Status
        ``converged`` (gradient), ``iteration_limit``, ``stagnated`` (no damping makes the loss
        fall), ``non_finite`` or ``interrupted``.
    losses : list of float
        Mean loss before the first and after each step; of the step's batch when there are batches.
    dampings : list of float
        Of the accepted steps.
    gradient_norm : float
        Of the mean loss, relative to the first.
    steps, inner_iterations : int
    batch_size : int
        Of the last step.
    seconds : float

    Examples
    --------
    >>> import torch, jacpot
    >>> x = torch.randn(20, 2)
    >>> result = jacpot.gauss_newton(torch.nn.Linear(2, 1), x, x[:, :1], max_steps=3)
    >>> len(result.losses) == result.steps + 1
    True
    """

    status: Status
    losses: list[float]
    dampings: list[float] = field(repr=False)
    gradient_norm: float = 1.0
    steps: int = 0
    inner_iterations: int = 0
    batch_size: int = 0
    seconds: float = 0.0

    @property
    def converged(self) -> bool:
        """Whether the gradient is below the tolerance."""
        return self.status is Status.converged


def gauss_newton(
    module: nn.Module,
    x: Inputs,
    y: Tensor,
    loss: str | Loss = "mse",
    max_steps: int = 50,
    tol: float = 1e-5,
    damping: float | None = None,
    batch_size: int | Literal["auto"] | None = "auto",
    mask: Mapping[str, Tensor] | None = None,
    inner_iterations: int | None = None,
    callback: Callable[[int, float, float], Any] | None = None,
    seed: int = 0,
    output: Output | None = None,
) -> GaussNewton:
    """Train a network, in place, by damped Gauss-Newton steps.

    A step d lowers the quadratic model ``⟨g, d⟩ + ½ dᵀ (B + damping·I) d`` of the mean loss, with
    the generalised Gauss-Newton matrix B; damped, it is not singular, however underdetermined the
    network. It is minimised over the span of two directions: the last step, and ``-P⁻¹ g`` with
    the matrix itself as P where it is small (in the dual or the primal), else its Kronecker
    factors (Martens & Grosse 2015, section 7). Where it is those, further inner iterations add the
    preconditioned residual, as conjugate gradients would. A step that is refused is found again
    with more damping in the same span, for the price of one evaluation of the loss. Its length is
    the power of two times the model's that suits the loss of the linearised network best: where
    the loss has an exponential tail, a parabola takes it for nearer than it is. The damping follows
    the ratio of the actual decrease and of the one predicted by that network (Marquardt 1963;
    Martens 2010).

    Parameters
    ----------
    module
        Trained in place. It holds the last accepted step at any time, also when interrupted or when
        the callback raises; arguments that are refused leave it as it was.
    x, y
        Inputs (N, ...), or a tuple or dict of them, and targets as in `LinearizedModule.fit`.
    loss
        As in `LinearizedModule.fit`.
    max_steps
        Steps, accepted ones.
    tol
        On the norm of the gradient relative to its first value; for full batches.
    damping
        The first; by default a hundredth of the mean diagonal of the kernel, scaled by the roots
        of the loss's Hessian.
    batch_size
        Examples a step, in a new random order each epoch. ``None``: all of them, so that the loss
        falls monotonically. ``"auto"``: 500, and twice as many whenever a step has less than a
        quarter of its effect on the examples of the next batch, until it is all of them (growing
        samples: Byrd, Chin, Nocedal & Wu 2012). Up to 999 examples are a full batch throughout.
        The gradient is that of the batch, the curvature that of at most 4,000 of its examples,
        drawn by the trace of the loss's Hessian: of examples that are fitted well, few are needed.
    mask
        Bool tensors by parameter name; pruned parameters stay zero.
    inner_iterations
        Directions a step, besides the last step's. Each takes a product with J, and each after
        the first another with its transpose. By default it is one, or, where the batch is all
        examples, as many as bring a tenth of the decrease that the model promises. Exact steps need
        no second.
    callback
        Called with ``(step, mean loss, seconds)``; False stops.
    seed
        Of the batches, and of the examples that the Kronecker factors are made of.
    output
        As in :func:`jacpot.jacobian`, of a module that gives several tensors.

    Returns
    -------
    GaussNewton

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Examples
    --------
    >>> import torch, jacpot
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
    >>> result = jacpot.gauss_newton(net, x, y, max_steps=30)
    >>> result.losses[-1] < 1e-3 * result.losses[0]
    True
    """
    for name, count, least in (
        ("max_steps", max_steps, 0),
        ("inner_iterations", inner_iterations, 1),
    ):
        if count is not None and count < least:
            raise ValueError(f"argument {name!r} must be at least {least}, got {count}")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"argument 'damping' must be finite and above 0, got {damping}")
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    n = n_examples(x)
    batches = Batches(n, batch_size, generator)
    objective = Objective(module, x, y, get_loss(loss), mask, output)
    result = GaussNewton(Status.iteration_limit, [], [])
    batch, previous, first_norm = batches.draw(), None, 0.0
    at: Evaluation | None = None
    while result.steps < max_steps:
        model = objective.model(batch, at, generator)
        if not result.steps:  # what could be refused has been by now
            objective.take(objective.weights)
        if model is None:
            result.status = Status.converged
            break
        result.losses[:] = result.losses or [model.value]
        norm = float(model.gradient.norm())
        first_norm = first_norm or norm
        result.gradient_norm = norm / first_norm if first_norm else 0.0
        if not (model.value < float("inf") and norm < float("inf")):
            result.status = Status.non_finite
            break
        optimal = norm == 0 or (batches.whole and result.gradient_norm <= tol)
        step = None
        if not optimal:
            unit = model.unit()
            damping = FIRST_DAMPING * unit if damping is None else damping
            # The matrix's own rounding is of this size: less damping is none.
            damping = max(damping, torch.finfo(model.operator.dtype).eps * unit)
            # What is known of a batch is not worth a better step: that would fit the batch.
            inner = 1 if inner_iterations is None and not batches.whole else inner_iterations
            step = _descend(objective, model, batch, damping, previous, inner)
        if step is None:  # nothing to gain on this batch, but maybe on a larger one
            if batches.double():
                batch, at, previous = batches.draw(), None, None
                continue
            result.status = Status.converged if optimal else Status.stagnated
            break
        at = step.at if batches.whole else None
        if not batches.whole:
            batch = batches.draw()
        if batches.growing:
            at = objective.evaluate(step.weights, batch)
            seen = objective.evaluate(objective.weights, batch).value - at.value
            if seen < SHARE * (model.value - step.at.value) and batches.double():
                batch, at = batches.draw(), None
        objective.take(step.weights)
        result.dampings.append(step.damping)
        ratio = (model.value - step.at.value) / step.predicted
        damping = step.damping * (2 / 3 if ratio > 3 / 4 else 3 / 2 if ratio < 1 / 4 else 1)
        previous = step.direction
        result.steps += 1
        result.inner_iterations += step.iterations
        result.batch_size = len(y[batch])
        result.losses.append(step.at.value)
        elapsed = time.perf_counter() - start
        if callback is not None and callback(result.steps, step.at.value, elapsed) is False:
            result.status = Status.interrupted
            break
    result.seconds = time.perf_counter() - start
    return result


@dataclass(frozen=True)
class _Step:
    direction: Tensor
    weights: Mapping[str, Tensor]
    damping: float
    predicted: float
    at: Evaluation
    iterations: int


def _descend(
    objective: Objective, model: QuadraticModel, batch: slice | Tensor,
    damping: float, previous: Tensor | None, iterations: int | None,
) -> _Step | None:  # fmt: skip
    """Find a step that lowers the loss of the batch, with more damping if need be."""
    if previous is not None:
        model.widen(previous)
    taken = _widen(model, damping, iterations)
    for _ in range(REJECTIONS):
        direction, predicted = model.step(damping)
        change = model.by_name(direction)
        weights = {n: w + change[n] if n in change else w for n, w in objective.weights.items()}
        at = objective.evaluate(weights, batch)
        if predicted > 0 and at.value < model.value:
            return _Step(direction, weights, damping, predicted, at, taken)
        damping *= 4
    return None


def _widen(model: QuadraticModel, damping: float, iterations: int | None) -> int:
    """Add preconditioned residuals to the span of the model's directions; give how many."""
    precondition = model.preconditioner(damping)
    model.widen(precondition(-model.gradient))
    taken, (_, decrease) = 1, model.minimise(damping)
    while not model.exact and taken < (iterations or INNER):
        model.widen(precondition(model.residual(damping)))
        taken, before, (_, decrease) = taken + 1, decrease, model.minimise(damping)
        if iterations is None and not decrease - before > WORTH * decrease:
            break
    return taken
