"""Generalised Gauss-Newton on the network itself, with Levenberg-Marquardt damping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jacpot.linalg import Status
from jacpot.tangent.jacobian import jacobian
from jacpot.tangent.losses import Loss, get_loss
from jacpot.tangent.newton import newton_direction
from jacpot.tangent.operators import JacobianOperator
from jacpot.tangent.squared import named

__all__ = ["GaussNewton", "gauss_newton"]

REJECTIONS = 12  # in a row, each with more damping, before it counts as stagnated


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
    seconds : float
    """

    status: Status
    losses: list[float]
    dampings: list[float] = field(repr=False)
    gradient_norm: float = 1.0
    steps: int = 0
    inner_iterations: int = 0
    seconds: float = 0.0

    @property
    def converged(self) -> bool:
        """Whether the gradient is below the tolerance."""
        return self.status is Status.converged


def gauss_newton(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str | Loss = "mse",
    max_steps: int = 50,
    tol: float = 1e-5,
    damping: float | None = None,
    batch_size: int | None = None,
    mask: Mapping[str, Tensor] | None = None,
    preconditioner: Any = "auto",
    inner_tol: float = 0.05,
    inner_max_iter: int = 200,
    callback: Callable[[int, float, float], Any] | None = None,
    seed: int = 0,
) -> GaussNewton:
    """Train a network, in place, by damped Gauss-Newton steps.

    Each step d solves ``(J̃ᵀ J̃ + damping·I) d = -∇L`` with the Jacobian at the present weights
    scaled by the root of the loss's Hessian, in the smaller of the dual and the primal space, so
    an underdetermined network is no singular system. The damping follows the ratio of actual
    and predicted decrease (Nielsen 1999; Marquardt 1963).

    Parameters
    ----------
    module
        Trained in place; its forward takes one tensor.
    x, y
        Inputs (N, ...) and targets as in `LinearizedModule.fit`.
    loss
        As in `LinearizedModule.fit`.
    max_steps
        Steps, accepted ones.
    tol
        On the norm of the gradient relative to its first value; for full batches.
    damping
        The first; by default a hundredth of the mean diagonal of ``J̃ J̃ᵀ``.
    batch_size
        Examples a step, in a new random order each epoch; all by default.
    mask
        Bool tensors by parameter name; pruned parameters stay zero.
    preconditioner, inner_tol, inner_max_iter
        Of the systems inside.
    callback
        Called with ``(step, mean loss, seconds)``; False stops.
    seed
        Of the batches.

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
    if max_steps < 0:
        raise ValueError(f"argument 'max_steps' must be at least 0, got {max_steps}")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"argument 'damping' must be finite and above 0, got {damping}")
    chosen, start = get_loss(loss), time.perf_counter()
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if mask:
        with torch.no_grad():
            for name, kept in mask.items():
                module.get_parameter(name).mul_(kept)
    result = GaussNewton(Status.iteration_limit, [], [])
    growth, first_gradient = 2.0, None
    for batch in _batches(len(x), batch_size, seed):
        if result.steps >= max_steps:
            break
        columns = jacobian(module, x[batch], mask=mask)
        operator = JacobianOperator(columns.blocks, columns.n_examples, columns.n_outputs)
        if 0 in operator.shape:
            result.status = Status.converged
            break
        f, targets = columns.outputs.double(), chosen.check(y[batch], columns.outputs)
        n = len(f)
        value = float(chosen.value(f, targets).sum())
        result.losses[:] = result.losses or [value / n]
        root, pull = chosen.root(f, targets), chosen.gradient(f, targets)
        gradient = (operator.T @ pull.reshape(-1)).double()
        norm = float(gradient.norm()) / n
        first_gradient = first_gradient or norm
        result.gradient_norm = norm / first_gradient if first_gradient else 0.0
        if not (value < float("inf") and norm < float("inf")):
            result.status = Status.non_finite
            break
        if norm == 0 or (batch_size is None and result.gradient_norm <= tol):
            result.status = Status.converged
            break
        if damping is None:
            scale = root.square().sum((1, 2)) / f.shape[1]
            rows = columns.row_norms().double().square().mean(1)
            damping = 0.01 * float((rows * scale).mean())
            damping = max(damping, 1e-12)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for _ in range(REJECTIONS):
            _move(parameters, before, {})
            direction = newton_direction(
                operator,
                root,
                gradient,
                damping,
                inner_tol,
                named(preconditioner),
                max_iter=inner_max_iter,
                precise=False,
            )
            result.inner_iterations += direction.iterations
            d = direction.x
            moved = (operator @ d).double().reshape(f.shape)
            curved = torch.einsum("nkl,nk->nl", root, moved).square().sum()
            predicted = -float((pull * moved).sum() + 0.5 * curved)
            _move(parameters, before, columns.unflatten(_flat(columns, operator, d)))
            with torch.no_grad():
                after = float(
                    chosen.value(module(x[batch]).reshape(f.shape).double(), targets).sum()
                )
            ratio = (value - after) / predicted if predicted > 0 else -1.0
            if ratio > 0 and after < value:
                result.dampings.append(damping)
                damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
                growth = 2.0
                break
            damping, growth = damping * growth, growth * 2
        else:
            _move(parameters, before, {})
            result.status = Status.stagnated
            break
        result.steps += 1
        result.losses.append(after / n)
        elapsed = time.perf_counter() - start
        if callback is not None and callback(result.steps, after / n, elapsed) is False:
            result.status = Status.interrupted
            break
    result.seconds = time.perf_counter() - start
    return result


def _batches(n: int, size: int | None, seed: int) -> Iterator[slice | Tensor]:
    if size is None or size >= n:
        while True:
            yield slice(None)
    if size < 1:
        raise ValueError(f"argument 'batch_size' must be at least 1, got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator, device="cpu")
        yield from (order[i : i + size] for i in range(0, n - n % size, size))


def _flat(columns: Any, operator: JacobianOperator, d: Tensor) -> Tensor:
    parts = torch.split(d.to(operator.own_dtype), operator.sizes)
    flat: Tensor = columns.from_blocks(parts)
    return flat


@torch.no_grad()
def _move(
    parameters: Mapping[str, Tensor], before: Mapping[str, Tensor], step: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(before[name] + step[name] if name in step else before[name])
