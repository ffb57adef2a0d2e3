"""Generalised Gauss-Newton on the network itself, with Levenberg-Marquardt damping."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacpot.linalg import Status
from jacpot.nn.stand_ins import call_with
from jacpot.nn.worn import merged_mask, plain_parameters
from jacpot.tangent.batches import Batches
from jacpot.tangent.jacobian import jacobian
from jacpot.tangent.losses import Loss, flat_targets, get_loss
from jacpot.tangent.network import Inputs, Output, arguments, n_examples, part_of, take
from jacpot.tangent.quadratic_model import QuadraticModel

__all__ = ["GaussNewton", "gauss_newton"]

FIRST_DAMPING = 0.01  # of the kernel's mean diagonal
CURVATURE = 4000  # examples that the curvature is taken from, at most; the gradient from all
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
    with more damping in the same span, for the price of one evaluation of the loss. The damping
    follows the ratio of actual and predicted decrease (Marquardt 1963; Martens 2010).

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
        The gradient is that of the batch, the curvature that of at most 4,000 of its examples.
    mask
        Bool tensors by parameter name; pruned parameters stay zero.
    inner_iterations
        Directions a step, besides the last step's. Each takes a product with J, and each after
        the first another with its transpose. By default it is one, or, where the model is of
        all examples, as many as bring a tenth of the decrease that it promises. Exact steps need no
        second.
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
    objective = _Objective(module, x, y, get_loss(loss), mask, output)
    result = GaussNewton(Status.iteration_limit, [], [])
    batch, previous, first_norm = batches.draw(), None, 0.0
    while result.steps < max_steps:
        model = objective.model(batch, generator)
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
            # What is known of a sample is not worth a better step: that would fit the sample.
            inner = 1 if inner_iterations is None and model.n < n else inner_iterations
            step = _descend(objective, model, batch, damping, previous, inner)
        if step is None:  # nothing to gain on this batch, but maybe on a larger one
            if batches.double():
                batch, previous = batches.draw(), None
                continue
            result.status = Status.converged if optimal else Status.stagnated
            break
        batch = batches.draw()
        if batches.growing:
            seen = objective.mean(objective.weights, batch) - objective.mean(step.weights, batch)
            if seen < SHARE * (model.value - step.loss) and batches.double():
                batch = batches.draw()
        objective.take(step.weights)
        result.dampings.append(step.damping)
        ratio = (model.value - step.loss) / step.predicted
        damping = step.damping * (2 / 3 if ratio > 3 / 4 else 3 / 2 if ratio < 1 / 4 else 1)
        previous = step.direction
        result.steps += 1
        result.inner_iterations += step.iterations
        result.batch_size = len(y[batch])
        result.losses.append(step.loss)
        elapsed = time.perf_counter() - start
        if callback is not None and callback(result.steps, step.loss, elapsed) is False:
            result.status = Status.interrupted
            break
    result.seconds = time.perf_counter() - start
    return result


class _Objective:
    """The mean loss of some examples as a function of the module's parameters.

    Attributes
    ----------
    weights : dict of Tensor
        The parameters that are trained or masked, by name, masked. The module has them from the
        first `take` on.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Inputs,
        y: Tensor,
        loss: Loss,
        mask: Mapping[str, Tensor] | None,
        output: Output | None,
    ) -> None:
        self.module, self.x, self.y, self.loss, self.output = module, x, y, loss, output
        self.mask = merged_mask(module, mask)
        every = plain_parameters(module)
        self._trained = [name for name, (_, p) in every.items() if p.requires_grad]
        self._own = {name: every[name] for name in {**dict.fromkeys(self._trained), **self.mask}}
        self.weights = {
            name: torch.where(self.mask[name], p.detach(), 0) if name in self.mask else p.detach()
            for name, (_, p) in self._own.items()
        }
        self._targets: Tensor | None = None

    def model(self, examples: slice | Tensor, generator: torch.Generator) -> QuadraticModel | None:
        """Give the quadratic model at the module's parameters; None where there is nothing."""
        x = take(self.x, examples)
        n = n_examples(x)
        some: slice | Tensor = slice(None)
        if n > CURVATURE:
            some = torch.randperm(n, generator=generator)[:CURVATURE]
        columns = jacobian(self.module, take(x, some), self.mask, output=self.output)
        if self._targets is None:  # of all examples, also of those that come later
            alike = columns.outputs[:1].expand(n_examples(self.x), -1)
            y = flat_targets(self.y, alike, columns.output_shape)
            self._targets = self.loss.check(y, alike)
        if 0 in columns.shape:
            return None
        y = self._targets[examples]
        curvature = getattr(self.loss, "majorant_root", self.loss.root)
        root = curvature(columns.outputs.double(), y[some])
        with torch.inference_mode(False), torch.enable_grad():
            weights = {n: self.weights[n].detach().requires_grad_() for n in self._trained}
            outputs = self._outputs({**self.weights, **weights}, x)
            f = outputs.detach().double()
            pull = (self.loss.gradient(f, y) / n).to(outputs.dtype)
            slopes = tuple(map(torch.zeros_like, weights.values()))
            if outputs.requires_grad:
                slopes = torch.autograd.grad(
                    outputs, list(weights.values()), pull, materialize_grads=True
                )
        gradient = dict(zip(weights, slopes, strict=True))
        value = float(self.loss.value(f, y).mean())
        return QuadraticModel(columns, root, gradient, value, generator)

    @torch.no_grad()
    def mean(self, weights: Mapping[str, Tensor], examples: slice | Tensor) -> float:
        """Evaluate the loss at other parameters; the module keeps its own."""
        assert self._targets is not None
        outputs = self._outputs(weights, take(self.x, examples)).double()
        return float(self.loss.value(outputs, self._targets[examples]).mean())

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Set the module's parameters."""
        # One call, so that an interrupt comes before or after all of them.
        torch._foreach_copy_([p for _, p in self._own.values()], [weights[n] for n in self._own])
        self.weights = {name: p.detach() for name, (_, p) in self._own.items()}

    def _outputs(self, weights: Mapping[str, Tensor], x: Inputs) -> Tensor:
        own = {self._own[name][0]: weight for name, weight in weights.items()}
        part = part_of(call_with(self.module, own, *arguments(x)), self.output)
        return part.reshape(len(part), -1)


@dataclass(frozen=True)
class _Step:
    direction: Tensor
    weights: Mapping[str, Tensor]
    damping: float
    predicted: float
    loss: float
    iterations: int


def _descend(
    objective: _Objective, model: QuadraticModel, batch: slice | Tensor,
    damping: float, previous: Tensor | None, iterations: int | None,
) -> _Step | None:  # fmt: skip
    """Find a step that lowers the loss of the batch, with more damping if need be."""
    if previous is not None:
        model.widen(previous)
    taken = _widen(model, damping, iterations)
    for _ in range(REJECTIONS):
        direction, predicted = model.minimise(damping)
        change = model.by_name(direction)
        weights = {n: w + change[n] if n in change else w for n, w in objective.weights.items()}
        loss = objective.mean(weights, batch)
        if predicted > 0 and loss < model.value:
            return _Step(direction, weights, damping, predicted, loss, taken)
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
