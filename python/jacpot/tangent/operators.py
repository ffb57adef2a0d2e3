"""A Jacobian's matrices as linear operators: J itself, the kernel J Jᵀ, and Jᵀ J.

They work on the blocks of the Jacobian and accumulate over slices of examples, so that the
float64 copies that exact residuals need stay small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jacpot.linalg import LinearOperator
from jacpot.ops.jacobian import Block, Factors, jvp, vjp

__all__ = ["GaussNewtonOperator", "JacobianOperator", "KernelOperator"]

SLICE_BYTES = 256 << 20  # of float64 factors held at once


def _slice(block: Block, begin: int, end: int, dtype: torch.dtype) -> Block:
    if isinstance(block, Factors):
        return dataclasses.replace(
            block,
            activations=block.activations[begin:end].to(dtype),
            signals=block.signals[begin:end].to(dtype),
        )
    return dataclasses.replace(block, rows=block.rows[begin:end].to(dtype))


class JacobianOperator(LinearOperator):
    """J as a matrix (N·K, P), in the dtype of its blocks or in another.

    Parameters
    ----------
    blocks
        The Jacobian's blocks (see `jacpot.ops.jacobian`).
    dtype
        What products are computed in; by default the blocks' own.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype | None = None) -> None:
        self.blocks = list(blocks)
        self.n_examples, self.n_outputs = blocks[0].n_examples, blocks[0].n_outputs
        self.sizes = [block.n_parameters for block in blocks]
        self.shape = (self.n_examples * self.n_outputs, sum(self.sizes))
        self.dtype = dtype or blocks[0].dtype

    def slices(self) -> Iterator[tuple[int, int, list[Block]]]:
        """Give the examples in slices, ``(begin, end, blocks)``, in this operator's dtype."""
        if self.dtype == self.blocks[0].dtype:
            yield 0, self.n_examples, self.blocks
            return
        per_example = sum(
            block.activations[:1].numel() + block.signals[:1].numel()
            if isinstance(block, Factors)
            else block.rows[:1].numel()
            for block in self.blocks
        )
        step = max(1, SLICE_BYTES // (8 * max(1, per_example)))
        for begin in range(0, self.n_examples, step):
            end = min(begin + step, self.n_examples)
            yield begin, end, [_slice(block, begin, end, self.dtype) for block in self.blocks]

    def forward(self, v: Tensor) -> Tensor:
        """J v: (P, R) -> (N, K, R)."""
        parts = v.split(self.sizes)
        return torch.cat([jvp(blocks, parts) for _, _, blocks in self.slices()])

    def backward(self, u: Tensor) -> Tensor:
        """Jᵀ u: (N, K, R) -> (P, R)."""
        out = u.new_zeros(self.shape[1], u.shape[2])
        for begin, end, blocks in self.slices():
            out += torch.cat(vjp(blocks, u[begin:end]))
        return out

    def _matmat(self, x: Tensor) -> Tensor:
        return self.forward(x).flatten(0, 1)

    def _adjoint(self) -> LinearOperator:
        return _Adjoint(self)

    def _outputs(self, u: Tensor) -> Tensor:
        return u.reshape(self.n_examples, self.n_outputs, u.shape[1])

    def double(self) -> JacobianOperator:
        return JacobianOperator(self.blocks, torch.float64)


class _Adjoint(LinearOperator):
    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[0])
        self.dtype = jacobian.dtype

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian.backward(self.jacobian._outputs(x))

    def _adjoint(self) -> LinearOperator:
        return self.jacobian

    def double(self) -> LinearOperator:
        return self.jacobian.double().T


class KernelOperator(LinearOperator):
    """The tangent kernel ``J Jᵀ`` (N·K, N·K), two passes over the factors a product."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[0], jacobian.shape[0])
        self.dtype = jacobian.dtype

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian._matmat(self.jacobian.T._matmat(x))

    def _adjoint(self) -> LinearOperator:
        return self

    def double(self) -> LinearOperator:
        return KernelOperator(self.jacobian.double())


class GaussNewtonOperator(LinearOperator):
    """``Jᵀ J`` (P, P)."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[1])
        self.dtype = jacobian.dtype

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian.T._matmat(self.jacobian._matmat(x))

    def _adjoint(self) -> LinearOperator:
        return self

    def double(self) -> LinearOperator:
        return GaussNewtonOperator(self.jacobian.double())
