"""A Jacobian whose factors are made again, batch by batch, whenever they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jacpot.ops.jacobian import Block
from jacpot.tangent.jacobian import Jacobian
from jacpot.tangent.network import Inputs, n_examples, take
from jacpot.tangent.operators import JacobianOperator, _at, mixed_blocks

__all__ = ["StreamedJacobian"]


class StreamedJacobian(JacobianOperator):
    """J in a batch's worth of memory, at the cost of a pass through the network a product.

    Parameters
    ----------
    capture
        Gives the Jacobian at some inputs.
    x
        Inputs (N, ...), or a tuple or dict of them.
    batch_size
        Examples whose factors are held at once.
    mix
        M (N, K, K) for ``Mᵀ J``; None for J.
    dtype
        What products are computed in; by default the network's own.
    """

    def __init__(
        self,
        capture: Callable[[Inputs], Jacobian],
        x: Inputs,
        batch_size: int,
        mix: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"argument 'batch_size' must be at least 1, got {batch_size}")
        self.capture, self.x, self.batch_size, self.mix = capture, x, batch_size, mix
        first = capture(take(x, slice(1)))
        super().__init__(first.blocks, n_examples(x), first.n_outputs, dtype, first.outputs.device)
        self.replayable = False

    def _blocks(self, examples: slice | Tensor) -> list[Block]:
        blocks = self.capture(take(self.x, examples)).blocks
        if self.mix is not None:
            blocks = mixed_blocks(blocks, self.mix[examples])
        return [_at(block, slice(None), self.dtype) for block in blocks]

    def slices(self, limit: int | None = None) -> Iterator[tuple[int, int, list[Block]]]:
        """Give the examples batch by batch."""
        for begin in range(0, self.n_examples, self.batch_size):
            end = min(begin + self.batch_size, self.n_examples)
            yield begin, end, self._blocks(slice(begin, end))

    def at(self, examples: Tensor) -> list[Block]:
        """Make the blocks of some examples."""
        return self._blocks(examples)

    def compiled(self, form: str, general: Any) -> Any:
        """Give ``general``: no blocks are in memory."""
        return general

    def mixed(self, matrix: Tensor) -> JacobianOperator:
        """``Mᵀ J``, as lazily."""
        mix = matrix.double() if self.mix is None else self.mix @ matrix
        return StreamedJacobian(self.capture, self.x, self.batch_size, mix, self.dtype)

    def double(self) -> JacobianOperator:
        """J with products in float64."""
        return StreamedJacobian(self.capture, self.x, self.batch_size, self.mix, torch.float64)
