"""What `LinearizedModule.fit` returns: a solution that can be asked further questions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from jacpot.linalg import Solution
from jacpot.linalg.arguments import check_number
from jacpot.ops.jacobian import gram
from jacpot.tangent.jacobian import Jacobian
from jacpot.tangent.losses import LOSSES, flat_targets
from jacpot.tangent.operators import JacobianOperator
from jacpot.tangent.posterior import Posterior
from jacpot.tangent.problem import Problem
from jacpot.tangent.spectrum import Spectrum, least

__all__ = ["Fit", "cross_kernel", "validation_error"]


@dataclass
class Fit(Solution):
    """A `Solution` of a tangent fit; ``x`` is Δ in the order of the Jacobian's columns.

    The questions below are for the squared loss. All but `posterior` take the eigenvalues of the
    kernel, computed once, for at most `jacpot.tangent.spectrum.LIMIT` = 20,000 values of y.

    Attributes
    ----------
    ridge : float
        As given, or as chosen.
    """

    ridge: float = 0.0
    problem: Problem | None = field(default=None, repr=False)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigenvectors of the kernel."""
        problem = self._squared()
        return Spectrum(problem.jacobian, problem.residual.reshape(-1))

    def at(self, time: float) -> dict[str, Tensor]:
        """Δ that gradient flow on the linearized loss reaches from zero in the given time.

        Gradient descent with step η is there after about ``time / η`` steps. ``math.inf`` gives
        the fit itself (Jacot et al. 2018; Lee et al. 2019, eq. 8).

        Parameters
        ----------
        time
            At least zero.

        Returns
        -------
        dict
            By parameter name, for `LinearizedModule.set_delta`.
        """
        if not time >= 0:
            raise ValueError(f"argument 'time' must be at least 0, got {time}")
        problem = self._squared()
        alpha = self.spectrum.flow(time, self.ridge)
        return problem.delta(problem.jacobian.double().T @ alpha)

    def early_stopped(
        self, x: Tensor, y: Tensor, times: Sequence[float] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """Give the time along the flow, and Δ there, with the least squared error on other data.

        Parameters
        ----------
        x, y
            Validation inputs, and targets (M, K).
        times
            Candidates, at least zero; by default 60 from before to after the kernel's time scales.
        """
        problem, spectrum = self._squared(), self.spectrum
        if times is None:
            rates = spectrum.values[spectrum.values > spectrum.noise] + self.ridge
            low, high = 0.01 / float(rates.max()), 10 / float(rates.min())
            times = torch.logspace(
                torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 60
            ).tolist()
        along = functools.partial(spectrum.flow, ridge=self.ridge)
        best = least(
            "times",
            [check_number("times", time) if time != math.inf else time for time in times],
            validation_error(problem, along, x, y),
        )
        alpha = spectrum.flow(best, self.ridge)
        return best, problem.delta(problem.jacobian.double().T @ alpha)

    def leave_one_out(self) -> Tensor:
        """Errors ``y_n - f_{-n}(x_n)``, (N, K), of the fits that leave out one example each."""
        problem = self._squared()
        self._needs_ridge()
        errors = self._weighted_leave_one_out()
        if problem.roots is None:
            return errors
        # What has no weight is left out already, and was not seen by the fit.
        roots = problem.roots.to(errors.device)[:, None]
        return torch.where(roots > 0, errors / roots, self._errors())

    def gcv(self) -> float:
        """Generalised cross-validation score of the ridge."""
        self._needs_ridge()
        return self.spectrum.gcv(self.ridge)

    def log_marginal_likelihood(self) -> float:
        """``log p(y)`` for ``Δ ~ N(0, I)`` and noise of variance ``ridge``."""
        self._needs_ridge()
        return self.spectrum.log_marginal_likelihood(self.ridge)

    def influence(self, x: Tensor) -> Tensor:
        """Give the change of the outputs at x were one training example left out.

        Parameters
        ----------
        x
            Inputs (M, ...).

        Returns
        -------
        Tensor
            (M, K, N): ``f_{-n}(x_m) - f(x_m)``.
        """
        problem, spectrum = self._squared(), self.spectrum
        self._needs_ridge()
        k = problem.jacobian.n_outputs
        at_x = problem.capture(x)
        cross = cross_kernel(problem, at_x)
        inverse = (spectrum.vectors * spectrum._inverse(self.ridge)) @ spectrum.vectors.T
        left_out = self._weighted_leave_one_out()
        pulled = (cross @ inverse).reshape(cross.shape[0], *left_out.shape)
        change = -torch.einsum("mnk,nk->mn", pulled, left_out)
        return change.reshape(at_x.n_examples, k, len(left_out))

    def posterior(self) -> Posterior:
        """Treat the fit as a Gaussian process: prior ``Δ ~ N(0, I)``, noise variance ``ridge``."""
        problem = self._squared()
        self._needs_ridge()
        return Posterior(
            problem.capture, problem.delta, problem.jacobian, problem.residual, self.ridge
        )

    def _weighted_leave_one_out(self) -> Tensor:
        return self.spectrum.leave_one_out(self.ridge, self._squared().jacobian.n_outputs)

    def _errors(self) -> Tensor:
        """``y - f`` (N, K) of the fit, without weights."""
        problem = self._squared()
        change = problem.unweighted.double() @ problem.by_blocks(self.x)
        return problem.errors - change.reshape(problem.errors.shape)

    def _squared(self) -> Problem:
        if self.problem is None or self.problem.loss != "mse":
            loss = None if self.problem is None else self.problem.loss
            raise ValueError(f"only a fit with loss='mse' has this, got loss={loss!r}")
        return self.problem

    def _needs_ridge(self) -> None:
        self._squared()
        if self.ridge <= 0:
            raise ValueError(f"only a fit with a ridge above 0 has this, got ridge={self.ridge}")


def cross_kernel(problem: Problem, other: Jacobian) -> Tensor:
    """Kernel (M·K, N·K) in float64 between other inputs and the fit's, rows weighted as there."""
    jacobian = problem.jacobian.double()
    left = JacobianOperator(
        other.blocks, other.n_examples, other.n_outputs, device=other.outputs.device
    ).double()
    if not left.blocks:
        return torch.zeros(
            left.shape[0], jacobian.shape[0], dtype=torch.float64, device=left.device
        )
    rows = [
        torch.cat([gram(a, b) for _, _, b in jacobian.slices()], dim=2) for _, _, a in left.slices()
    ]
    return torch.cat(rows).reshape(left.shape[0], jacobian.shape[0])


def validation_error(
    problem: Problem, dual: Callable[[float], Tensor], x: Tensor, y: Tensor
) -> Callable[[float], float]:
    """Give the function from what ``dual`` takes (a ridge, a time) to the squared error."""
    other = problem.capture(x)
    cross = cross_kernel(problem, other)
    y = flat_targets(y, other.outputs, other.output_shape)
    wanted = LOSSES["mse"].check(y, other.outputs) - other.outputs.double()
    return lambda value: float(
        ((cross @ dual(value)).reshape(wanted.shape) - wanted).square().sum()
    )
