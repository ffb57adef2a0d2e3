"""The preconditioner that a tangent fit takes when it is not told one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jacpot.linalg import LinearOperator
from jacpot.linalg.preconditioners import Cholesky, Nystrom, Preconditioner, Prepared
from jacpot.tangent.operators import GaussNewtonOperator, KernelOperator
from jacpot.tangent.preconditioners.kronecker import Kronecker
from jacpot.tangent.preconditioners.trace_kernel import TraceKernel

__all__ = ["Auto"]

DIRECT_SIZE = 4000  # a matrix of this size is written out and factored in about a second
TRACE_EXAMPLES = 5_000  # beyond, the N x N factor costs more a product than the kernel itself
SMALL_RIDGE = 0.02  # of the mean diagonal; below, low rank alone leaves too much


@dataclass(frozen=True)
class Auto(Preconditioner):
    """Choose by size and by the ridge's share of the kernel's mean diagonal.

    Small systems are factored. Large duals take the adaptive Nyström approximation where the ridge
    covers the tail of the spectrum, and the trace kernel where it does not; large primals take
    Kronecker factors.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.tangent.preconditioners import Auto
    >>> net, x, y = torch.nn.Linear(4, 1), torch.randn(20, 4), torch.randn(20, 1)
    >>> options = {"ridge": 0.1, "method": "dual", "preconditioner": Auto()}
    >>> jacpot.linearize(net).fit(x, y, **options).preconditioner
    'auto: cholesky(float32) (20 unknowns)'
    """

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:
        """Make the chosen one; the description says which and why."""
        chosen, why = _choose(operator, damping)
        prepared = chosen.prepare(operator, damping)
        return replace(prepared, description=f"auto: {prepared.description} ({why})")


def _choose(operator: LinearOperator, damping: float) -> tuple[Preconditioner, str]:
    if operator.shape[0] <= DIRECT_SIZE:
        return Cholesky(), f"{operator.shape[0]} unknowns"
    if isinstance(operator, GaussNewtonOperator):
        return Kronecker(), "primal"
    if not isinstance(operator, KernelOperator):
        return Nystrom(), "general operator"
    share = damping / max(float(operator.diagonal().mean()), 1e-300)
    if share >= SMALL_RIDGE or operator.jacobian.n_examples > TRACE_EXAMPLES:
        return Nystrom(), f"ridge {share:.2g} of the mean diagonal"
    return TraceKernel(), f"ridge {share:.2g} of the mean diagonal"
