"""What a solver returns: the solution and an honest account of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Interrupted", "Solution", "SolverError", "Status"]


class Status(Enum):
    """How a solve ended; the value is the name, `message` the sentence.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg import Status
    >>> solution = jacpot.solve(torch.diag(torch.arange(1.0, 9.0)), torch.ones(8), method="cg",
    ...                         max_iter=2)
    >>> solution.status is Status.iteration_limit
    True
    >>> solution.status.message
    'the iteration limit was reached; raise max_iter or use a preconditioner'
    """

    converged = "converged"
    stagnated = "stagnated"
    iteration_limit = "iteration_limit"
    indefinite = "indefinite"
    inconsistent = "inconsistent"
    preconditioner = "preconditioner"
    non_finite = "non_finite"
    interrupted = "interrupted"

    @property
    def message(self) -> str:
        """What it means, and the cure where there is one."""
        return _MESSAGES[self.value]


_MESSAGES = {
    "converged": "the residual, recomputed in float64, is below the tolerance; of a least-squares "
    "problem, its product with the transpose",
    "stagnated": "stagnated at the attainable accuracy; more damping, a larger tolerance or a "
    "float64 operator would help",
    "iteration_limit": "the iteration limit was reached; raise max_iter or use a preconditioner",
    "indefinite": "breakdown: the operator is not positive definite; use method='minres'",
    "inconsistent": "breakdown: the operator is singular and the right-hand side is not in its "
    "range; use method='lsmr' for the least-squares solution, or damping",
    "preconditioner": "breakdown: the preconditioner is not positive definite",
    "non_finite": "a product with the operator or the preconditioner, or the solution, is not "
    "finite",
    "interrupted": "interrupted; x holds the iterate reached so far",
}


class SolverError(RuntimeError):
    """Raised by `Solution.raise_if_failed`.

    Examples
    --------
    >>> import torch, jacpot
    >>> singular = jacpot.solve(torch.zeros(2, 2), torch.ones(2), method="cg")
    >>> try:
    ...     singular.raise_if_failed()
    ... except jacpot.linalg.SolverError as error:
    ...     print(str(error).split()[0])
    inconsistent
    """


@dataclass
class Solution:
    """The result of :func:`jacpot.solve`.

    Attributes
    ----------
    x : Tensor or ndarray
        float64, of the kind of the right-hand side. Rounding it to float32 can undo convergence.
    status : Status
    iterations : int
        Of the method; block and several-column methods count one for all columns.
    residual_norm, relative_residual : float
        Recomputed from ``x`` in float64; of several right-hand sides the worst relative one. Of a
        least-squares problem some of it stays: see :func:`jacpot.solve`.
    history : list of float
        Worst relative residual after each iteration, as the method's recurrence has it.
    method, preconditioner : str
        What was used, and why when it was chosen automatically.
    seconds, setup_seconds : float
        Whole time, and the part of it that preparing (preconditioner, factorisation) took.
    details : dict
        Whatever else the method tells.

    Examples
    --------
    >>> import torch
    >>> import jacpot
    >>> solution = jacpot.solve(torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 8.0]))
    >>> solution.converged
    True
    >>> solution.raise_if_failed().x
    tensor([1., 2.], dtype=torch.float64)
    """

    x: Any = field(repr=False)
    status: Status
    iterations: int
    residual_norm: float
    relative_residual: float
    history: list[float] = field(default_factory=list, repr=False)
    method: str = ""
    preconditioner: str = "none"
    seconds: float = 0.0
    setup_seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def converged(self) -> bool:
        """Whether the recomputed residual is below the tolerance."""
        return self.status is Status.converged

    def raise_if_failed(self) -> Solution:
        """Return self when converged; raise `SolverError` with the reason otherwise."""
        if not self.converged:
            raise SolverError(str(self))
        return self

    def __str__(self) -> str:
        setup = f" ({self.setup_seconds:.2g} s of it setup)" if self.setup_seconds > 0 else ""
        text = (
            f"{self.status.value} by {self.method}, preconditioner {self.preconditioner}: "
            f"{self.iterations} iterations, relative residual {self.relative_residual:.2e}, "
            f"{self.seconds:.3g} s{setup}"
        )
        return (
            text
            if self.converged
            else f"{text}. {self.status.message[0].upper()}" + (f"{self.status.message[1:]}.")
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a solve; ``solution`` holds the iterate reached so far.

    Examples
    --------
    >>> import torch, jacpot
    >>> def press_ctrl_c(iteration, residual, seconds):
    ...     if iteration == 3:
    ...         raise KeyboardInterrupt
    >>> diagonal = torch.diag(torch.arange(1.0, 9.0))
    >>> try:
    ...     jacpot.solve(diagonal, torch.ones(8), method="cg", callback=press_ctrl_c)
    ... except jacpot.linalg.Interrupted as stop:
    ...     stop.solution.status.value, stop.solution.x.shape
    ('interrupted', torch.Size([8]))
    """

    def __init__(self, solution: Solution) -> None:
        super().__init__(str(solution))
        self.solution = solution
