"""The trace kernel, one N x N Cholesky factor shared by all outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.linalg import LinearOperator
from jacpot.linalg.preconditioners import Preconditioner, Prepared
from jacpot.linalg.preconditioners.base import inner_products
from jacpot.linalg.preconditioners.nystrom import Nystrom
from jacpot.ops.jacobian import gram
from jacpot.tangent.operators import JacobianOperator, KernelOperator

__all__ = ["TraceKernel"]


@dataclass(frozen=True)
class TraceKernel(Preconditioner):
    """``(Θ_trace / K + damping·I) ⊗ I`` in place of the kernel, which it equals for infinite width.

    What finite width adds is a coupling of the outputs. Two refinements take it in: the mean
    covariance of the outputs, whose eigendirections each get a Cholesky factor of their own; and a
    coarse space of Nyström eigenvectors U, on which the kernel's own eigenvalues Λ are used,
    ``(I - U Uᵀ) T⁻¹ (I - U Uᵀ) + U (Λ + damping·I)⁻¹ Uᵀ``, positive definite whatever U is.

    Parameters
    ----------
    coupled
        Use the covariance of the outputs: K factorisations instead of one.
    coarse
        Columns of the coarse space; 0 for none.
    seed
        Of the coarse space's sample.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.tangent.preconditioners import TraceKernel
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    >>> x, y = torch.randn(20, 4), torch.randn(20, 3)
    >>> options = {"ridge": 0.1, "method": "dual", "preconditioner": TraceKernel(coupled=True)}
    >>> jacpot.linearize(net).fit(x, y, **options).preconditioner
    'trace_kernel(coupled)'
    """

    coupled: bool = False
    coarse: int = 0
    seed: int = 0

    def prepare(self, operator: LinearOperator, damping: float) -> Prepared:
        """Make it for a `KernelOperator` with a ridge above zero."""
        if not isinstance(operator, KernelOperator):
            raise TypeError(
                "argument 'preconditioner': the trace kernel needs a tangent kernel (the dual), "
                f"got {type(operator).__name__}"
            )
        if operator.shape[0] == 0:
            return Prepared(None, "none")
        jacobian = operator.jacobian
        k = jacobian.n_outputs
        kernel = _trace(jacobian).div_(k)
        weights, directions = torch.ones(1, dtype=kernel.dtype, device="cpu"), None
        if self.coupled and k > 1:
            weights, directions = _output_covariance(operator)
        factors = [_cholesky(kernel, float(weight), damping) for weight in weights]
        inverse: LinearOperator = _Separable(factors, directions, k)
        text = "trace_kernel" + ("(coupled)" if directions is not None else "")
        if self.coarse:
            inverse = _with_coarse_space(inverse, operator, damping, self.coarse, self.seed)
            text += f" + coarse space of {self.coarse}"
        return Prepared(inverse, text)


def _trace(jacobian: JacobianOperator) -> Tensor:
    n = jacobian.n_examples
    out = torch.empty(n, n, dtype=jacobian.dtype, device=jacobian.device)
    for begin, end, left in jacobian.slices():
        if end - begin == n:
            return gram(left, outputs="trace")  # type: ignore[no-any-return]
        for first, last, right in jacobian.slices():
            if last <= end:
                tile = gram(left, right, outputs="trace")
                out[begin:end, first:last] = tile
                out[first:last, begin:end] = tile.T
    return out


def _cholesky(kernel: Tensor, weight: float, damping: float) -> Tensor:
    """Factor ``weight·kernel + shift·I``; rounding may need a shift above the damping."""
    # A factor in this dtype is exact for a matrix this far away at best.
    vector = kernel.new_ones(kernel.shape[0], 1)
    for _ in range(4):
        vector = kernel @ (vector / vector.norm())
    noise = 2 * torch.finfo(kernel.dtype).eps * weight * float(vector.norm())
    shift = max(damping, noise)
    while True:
        shifted = kernel * weight
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            result: Tensor = factor
            return result
        shift *= 10


def _output_covariance(operator: KernelOperator) -> tuple[Tensor, Tensor]:
    """Eigenvalues, of mean one, and eigenvectors of the outputs' mean covariance in the kernel."""
    k = operator.jacobian.n_outputs
    step = max(1, operator.jacobian.n_examples // 64)
    examples = torch.arange(0, operator.jacobian.n_examples, step, device=operator.device)
    indices = (examples[:, None] * k + torch.arange(k, device=operator.device)).reshape(-1)
    sample = operator.columns(indices)[indices].reshape(len(examples), k, len(examples), k)
    covariance = sample.sum((0, 2)).double()
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values = values.clamp_min(1e-3 * float(values[-1]))
    return (values / values.mean()).to(operator.dtype), vectors.to(operator.dtype)


class _Separable(LinearOperator):
    """Solves with one Cholesky factor for each direction of the outputs, or one for all."""

    def __init__(self, factors: list[Tensor], directions: Tensor | None, k: int) -> None:
        self.factors, self.directions, self.k = factors, directions, k
        n = factors[0].shape[0] * k
        self.shape, self.dtype = (n, n), factors[0].dtype
        self.device = factors[0].device

    def _matmat(self, x: Tensor) -> Tensor:
        n, r = self.factors[0].shape[0], x.shape[1]
        columns = x.reshape(n, self.k, r)
        if self.directions is None:
            return torch.cholesky_solve(columns.flatten(1), self.factors[0]).reshape(x.shape)
        rotated = torch.einsum("nkr,kd->dnr", columns, self.directions)
        solved = torch.stack(
            [torch.cholesky_solve(part, f) for part, f in zip(rotated, self.factors, strict=True)]
        )
        return torch.einsum("dnr,kd->nkr", solved, self.directions).reshape(x.shape)

    def _adjoint(self) -> LinearOperator:
        return self


class _TwoLevel(LinearOperator):
    def __init__(self, fine: LinearOperator, basis: Tensor, inverse_values: Tensor) -> None:
        self.fine, self.basis, self.inverse_values = fine, basis, inverse_values
        self.shape, self.dtype, self.device = fine.shape, fine.dtype, fine.device

    def _matmat(self, x: Tensor) -> Tensor:
        coarse = self.basis @ x
        fine = self.fine._matmat(torch.addmm(x, self.basis.T, coarse, alpha=-1))
        change = self.inverse_values[:, None] * coarse - self.basis @ fine
        return torch.addmm(fine, self.basis.T, change)

    def _adjoint(self) -> LinearOperator:
        return self


def _with_coarse_space(
    fine: LinearOperator, operator: KernelOperator, damping: float, size: int, seed: int
) -> LinearOperator:
    rows = Nystrom(seed=seed).factor(operator, size)
    values, vectors = torch.linalg.eigh(inner_products(rows).double())
    # Directions below float32's resolution of the largest are noise.
    keep = values > 1e2 * torch.finfo(rows.dtype).eps * values[-1:].sum()
    values, vectors = values[keep], vectors[:, keep]
    basis = (vectors / values.sqrt()).to(rows.dtype).T @ rows
    return _TwoLevel(fine, basis, (1 / (values + damping)).to(rows.dtype))
