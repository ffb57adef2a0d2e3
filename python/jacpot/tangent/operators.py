"""A Jacobian's matrices as linear operators: J itself, the kernel J Jᵀ, and Jᵀ J.

They work on the blocks of the Jacobian and accumulate over slices of examples, so that the
float64 copies that exact residuals need stay small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import core, threads
from jacpot.linalg import FunctionOperator, LinearOperator
from jacpot.ops.jacobian import (
    Added,
    Block,
    Factors,
    Lookup,
    Rows,
    column_norms,
    dense,
    gram,
    joined_vjp,
    jvp,
    row_norms,
)

__all__ = ["GaussNewtonOperator", "JacobianOperator", "KernelOperator", "OrderedOperator"]

SLICE_BYTES = 16 << 20  # of float64 factors made at once: they are used while in cache
WHOLE_BYTES = 256 << 20  # of float64 factors for a symmetric Gram matrix, which takes them all
REPLAYED_BYTES = 64 << 20  # of factors whose products take a GPU less time than their launches
COLUMN_CHUNK = 1 << 19  # elements of columns that are computed while they are in cache


def _at(block: Block, examples: slice | Tensor, dtype: torch.dtype) -> Any:
    """Give a block of some of the examples, in a dtype."""
    if isinstance(block, Factors):
        return dataclasses.replace(
            block,
            activations=block.activations[examples].to(dtype),
            signals=block.signals[examples].to(dtype),
        )
    if isinstance(block, Lookup):
        signals = block.signals[examples].to(dtype)
        return dataclasses.replace(block, tokens=block.tokens[examples], signals=signals)
    if isinstance(block, Added):
        return Added(tuple(_at(part, examples, dtype) for part in block.parts))
    return dataclasses.replace(block, rows=block.rows[examples].to(dtype))


def _is_plain(block: Factors) -> bool:
    """Tell whether a column is the product of one element of ``a aᵀ`` and one of ``δ δᵀ``."""
    return block.pattern is None and block.n_positions == 1 and block.shape[0] == 1


def mixed_blocks(blocks: Sequence[Block], matrix: Tensor) -> list[Block]:
    """Blocks of ``Mᵀ J`` for a matrix M (N, K, K) of each example's own."""
    return [_mixed(block, matrix.to(block.dtype)) for block in blocks]


def _mixed(block: Block, mix: Tensor) -> Any:
    if isinstance(block, Added):
        return Added(tuple(_mixed(part, mix) for part in block.parts))
    if isinstance(block, Rows):
        return dataclasses.replace(block, rows=mix.mT @ block.rows)
    signals = (mix.mT @ block.signals.flatten(2)).reshape(block.signals.shape)
    return dataclasses.replace(block, signals=signals)


class JacobianOperator(LinearOperator):
    """J as a matrix (N·K, P), in the dtype of its blocks or in another.

    Parameters
    ----------
    blocks
        The Jacobian's blocks (see `jacpot.ops.jacobian`); none at all when everything is pruned.
    n_examples, n_outputs
        N and K.
    dtype
        What products are computed in; by default the blocks' own.
    device
        Needed where there are no blocks to tell.
    """

    least_squares = True

    def __init__(
        self,
        blocks: Sequence[Block],
        n_examples: int,
        n_outputs: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.n_examples, self.n_outputs = n_examples, n_outputs
        self.sizes = [block.n_parameters for block in blocks]
        self.shape = (n_examples * n_outputs, sum(self.sizes))
        self.own_dtype = blocks[0].dtype if blocks else torch.float64
        self.dtype = dtype or self.own_dtype
        self.device = blocks[0].device if blocks else device or torch.device("cpu")
        size = sum(block.nbytes for block in self.blocks)
        self.replayable = self.dtype == self.own_dtype and size <= REPLAYED_BYTES

    @property
    def held(self) -> bool:
        """Whether products are with the blocks themselves, and not with copies made for each."""
        return self.dtype == self.own_dtype

    def at(self, examples: Tensor) -> list[Block]:
        """Give the blocks of some examples, in this operator's dtype."""
        return [_at(block, examples, self.dtype) for block in self.blocks]

    def mixed(self, matrix: Tensor) -> JacobianOperator:
        """``Mᵀ J`` with its own matrix M (N, K, K) for each example: signals are mixed, no more."""
        blocks = mixed_blocks(self.blocks, matrix)
        return JacobianOperator(blocks, self.n_examples, self.n_outputs, self.dtype, self.device)

    def weighted(self, weights: Tensor) -> JacobianOperator:
        """J with the rows of each example times its weight (N,)."""
        return self.mixed(torch.diag_embed(weights[:, None].expand(-1, self.n_outputs)))

    def slices(self, limit: int | None = None) -> Iterator[tuple[int, int, list[Block]]]:
        """Give the examples in slices, ``(begin, end, blocks)``, in this operator's dtype.

        Where they are copies, a slice is at most ``limit`` bytes, by default `SLICE_BYTES`.
        """
        if self.held:
            yield 0, self.n_examples, self.blocks
            return
        size = sum(block.nbytes for block in self.blocks) // max(1, self.n_examples)
        doubled = size // self.own_dtype.itemsize * 8
        step = max(1, (limit or SLICE_BYTES) // max(1, doubled))
        for begin in range(0, max(1, self.n_examples), step):  # no examples are a slice, too
            end = min(begin + step, self.n_examples)
            yield begin, end, [_at(block, slice(begin, end), self.dtype) for block in self.blocks]

    def compiled(self, form: str, general: Any) -> Any:
        """Give J, J Jᵀ or Jᵀ J as compiled products, or ``general`` where there are none.

        There are where the blocks are in memory in this operator's dtype; products in float64 are
        the general ones unless that is it.
        """
        held = [block for block in self.blocks if not isinstance(block, Lookup | Added)]
        if not held or len(held) < len(self.blocks) or self.dtype != self.own_dtype:
            return general
        blocks = [
            block.live or (block.operands, *block.layout, block.bias)
            if isinstance(block, Factors)
            else block.rows.contiguous()
            for block in held
        ]
        exact = None if self.dtype == torch.float64 else general
        return core.JacobianOperator(form, blocks, self.shape[0], exact, threads())

    def _normal(self) -> LinearOperator:
        return GaussNewtonOperator(self)

    def _kernel(self) -> LinearOperator:
        return KernelOperator(self)

    def _core(self) -> Any:
        return self.compiled("jacobian", super()._core())

    def forward(self, v: Tensor) -> Tensor:
        """J v: (P, R) -> (N, K, R)."""
        if not self.blocks:
            return v.new_zeros(self.n_examples, self.n_outputs, v.shape[1])
        parts = torch.split(v, self.sizes)
        return torch.cat([jvp(blocks, parts, self.held) for _, _, blocks in self.slices()])

    def backward(self, u: Tensor) -> Tensor:
        """Jᵀ u: (N, K, R) -> (P, R)."""
        out = u.new_zeros(self.shape[1], u.shape[2])
        if self.blocks:
            for begin, end, blocks in self.slices():
                out += joined_vjp(blocks, u[begin:end], self.held)
        return out

    def _matmat(self, x: Tensor) -> Tensor:
        return self.forward(x).flatten(0, 1)

    def _adjoint(self) -> LinearOperator:
        return _Adjoint(self)

    def _outputs(self, u: Tensor) -> Tensor:
        return u.reshape(self.n_examples, self.n_outputs, u.shape[1])

    def double(self) -> JacobianOperator:
        """Return J with products in float64."""
        return JacobianOperator(
            self.blocks, self.n_examples, self.n_outputs, torch.float64, self.device
        )

    def _dense(self) -> Tensor:
        return torch.cat([dense(blocks) for _, _, blocks in self.slices()]).flatten(0, 1)


class OrderedOperator(LinearOperator):
    """J with its columns in another order than the blocks have them.

    Parameters
    ----------
    jacobian
        J in the order of the blocks.
    to_blocks
        Cuts vectors (P, R) in this order into those of the blocks.
    from_blocks
        The inverse.
    """

    least_squares = True

    def __init__(
        self,
        jacobian: JacobianOperator,
        to_blocks: Callable[[Tensor], list[Tensor]],
        from_blocks: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        self.jacobian, self.to_blocks, self.from_blocks = jacobian, to_blocks, from_blocks
        self.shape, self.dtype, self.device = jacobian.shape, jacobian.dtype, jacobian.device

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian._matmat(torch.cat(self.to_blocks(x)))

    def _kernel(self) -> LinearOperator:
        return KernelOperator(self.jacobian)

    def _pull(self, u: Tensor) -> Tensor:
        return self.from_blocks(torch.split(self.jacobian.T._matmat(u), self.jacobian.sizes))

    def _adjoint(self) -> LinearOperator:
        transposed = FunctionOperator(
            (self.shape[1], self.shape[0]),
            self._pull,
            self._matmat,
            self.dtype,
            lambda: self.double().T,
            self.device,
        )
        transposed.least_squares = True
        return transposed

    def _double(self) -> LinearOperator:
        return OrderedOperator(self.jacobian.double(), self.to_blocks, self.from_blocks)


class _Adjoint(LinearOperator):
    least_squares = True

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[0])
        self.dtype, self.device = jacobian.dtype, jacobian.device

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian.backward(self.jacobian._outputs(x))

    def _adjoint(self) -> LinearOperator:
        return self.jacobian

    def _double(self) -> LinearOperator:
        return self.jacobian.double().T


class KernelOperator(LinearOperator):
    """The tangent kernel ``J Jᵀ`` (N·K, N·K), two passes over the factors a product."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[0], jacobian.shape[0])
        self.dtype, self.device = jacobian.dtype, jacobian.device
        self.replayable = jacobian.replayable
        # Layers with positions or masks give the columns of all outputs of an example at once.
        single = all(isinstance(b, Factors) and _is_plain(b) for b in jacobian.blocks)
        self.column_group = 1 if single else max(1, jacobian.n_outputs)

    def _columns(self, indices: Tensor) -> Tensor:
        if not self.jacobian.blocks:
            options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
            return torch.zeros(self.shape[0], len(indices), **options)
        k = self.jacobian.n_outputs
        examples, inverse = torch.unique(indices // k, return_inverse=True)
        at = inverse * k + indices % k
        whole = len(at) == len(examples) * k and bool((at.diff() == 1).all())
        if self.column_group == 1 and not whole:
            return self._single_columns(indices)
        chosen = self.jacobian.at(examples)
        parts = []
        for _, _, blocks in self.jacobian.slices():
            parts.append(gram(blocks, chosen))
        columns = torch.cat(parts).reshape(self.shape[0], -1)
        return columns if whole else columns[:, at]

    def _single_columns(self, indices: Tensor) -> Tensor:
        """Columns of single outputs, each of a plain example; they lie one after another."""
        k, r = self.jacobian.n_outputs, len(indices)
        chosen = []
        for block in self.jacobian.at(indices // k):
            assert isinstance(block, Factors)
            signals = block.signals[torch.arange(r, device=self.device), indices % k].reshape(r, -1)
            chosen.append((block.activations.reshape(r, -1).T, signals.T))
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        out = torch.empty(r, self.shape[0], **options)
        step = max(1, COLUMN_CHUNK // max(1, k * r))
        for begin, end, blocks in self.jacobian.slices():
            for first in range(0, end - begin, step):
                last = min(first + step, end - begin)
                strip = torch.zeros(last - first, k, r, **options)
                for block, (inputs, outputs) in zip(blocks, chosen, strict=True):
                    assert isinstance(block, Factors)
                    a = block.activations[first:last].reshape(last - first, -1) @ inputs
                    s = block.signals[first:last].reshape((last - first) * k, -1) @ outputs
                    strip.addcmul_(s.view(strip.shape), (a + int(block.bias))[:, None, :])
                out[:, (begin + first) * k : (begin + last) * k] = strip.view(-1, r).T
        return out.T

    def _dense(self) -> Tensor:
        if not self.jacobian.blocks or 0 in self.shape:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        _, end, blocks = next(self.jacobian.slices(WHOLE_BYTES))
        if end < self.jacobian.n_examples:
            return self._columns(torch.arange(self.shape[0], device=self.device))
        full: Tensor = gram(blocks)  # symmetric: half of it is computed
        return full.reshape(self.shape)

    def _diagonal(self) -> Tensor:
        return (
            torch.cat([row_norms(blocks) for _, _, blocks in self.jacobian.slices()])
            .square()
            .reshape(-1)
        )

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian._matmat(self.jacobian.T._matmat(x))

    def _core(self) -> Any:
        return self.jacobian.compiled("kernel", super()._core())

    def _adjoint(self) -> LinearOperator:
        return self

    def _double(self) -> LinearOperator:
        return KernelOperator(self.jacobian.double())


class GaussNewtonOperator(LinearOperator):
    """``Jᵀ J`` (P, P)."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[1])
        self.dtype, self.device = jacobian.dtype, jacobian.device
        self.replayable = jacobian.replayable

    def _dense(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for _, _, blocks in self.jacobian.slices():
            rows = dense(blocks).flatten(0, 1)
            total.addmm_(rows.T, rows)
        return total

    def _diagonal(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        for _, _, blocks in self.jacobian.slices():
            total += column_norms(blocks).double().square()
        return total.to(self.dtype)

    def _matmat(self, x: Tensor) -> Tensor:
        return self.jacobian.T._matmat(self.jacobian._matmat(x))

    def _core(self) -> Any:
        return self.jacobian.compiled("gauss_newton", super()._core())

    def _adjoint(self) -> LinearOperator:
        return self

    def _double(self) -> LinearOperator:
        return GaussNewtonOperator(self.jacobian.double())
