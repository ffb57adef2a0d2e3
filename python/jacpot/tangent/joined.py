"""The Jacobians of successive examples as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import empty
from jacpot.ops.jacobian import Added, Block, Factors, Lookup, Rows
from jacpot.tangent.factored import Jacobian
from jacpot.tangent.pieces import stacked
from jacpot.tangent.room import in_a_row

__all__ = ["joined"]


def joined(parts: Iterable[Jacobian], n: int) -> Jacobian:
    """Join the Jacobians of successive examples, n in all, into one.

    What a part holds is copied and dropped before the next one is made, so that the memory of one
    part is all that is needed besides the result's.
    """
    coming = iter(parts)
    first = next(coming)
    if first.n_examples == n:
        return first
    gathered = [_Gathered(n, x) for x in (first.outputs, *_held(first.blocks))]
    unlike: list[Jacobian] = []
    for part in coming:
        if not (first._matches(part) and _as_long(first, part)):
            unlike = [part, *coming]
            break
        for all_of_it, x in zip(gathered, (part.outputs, *_held(part.blocks)), strict=True):
            all_of_it.add(x)
        del part
    outputs, *held = [all_of_it.rows for all_of_it in gathered]
    ahead = iter(held)
    blocks = [_holding(block, ahead) for block in first.blocks]
    whole = Jacobian(outputs, blocks, first._columns, first._orders, first.output_shape)
    if not unlike:
        return whole
    outputs = torch.cat([outputs, *[part.outputs for part in unlike]])
    blocks, orders = stacked([part._pieces() for part in (whole, *unlike)])
    return Jacobian(outputs, blocks, first._columns, orders, first.output_shape)


class _Gathered:
    """Successive parts of a tensor ``(n, ...)``: copied, unless they lie in a row as they are."""

    def __init__(self, n: int, first: Tensor) -> None:
        self.n, self.rows = n, first
        self._whole: Tensor | None = None

    def add(self, part: Tensor) -> None:
        done = len(self.rows)
        if self._whole is None:
            if (row := in_a_row([self.rows, part])) is not None:
                self.rows = row
                return
            self._whole = empty((self.n, *part.shape[1:]), part)
            self._whole[:done] = self.rows
        self._whole[done : done + len(part)] = part
        self.rows = self._whole[: done + len(part)]


def _as_long(a: Jacobian, b: Jacobian) -> bool:
    """Whether blocks that match have as many positions."""
    return all(
        isinstance(p, Rows) or isinstance(q, Rows) or p.n_positions == q.n_positions
        for p, q in zip(_simple(a.blocks), _simple(b.blocks), strict=True)
    )


def _simple(blocks: Iterable[Block]) -> Iterator[Factors | Lookup | Rows]:
    for block in blocks:
        yield from block.parts if isinstance(block, Added) else (block,)


def _held(blocks: Iterable[Block]) -> Iterator[Tensor]:
    """The tensors of blocks, examples first."""
    for block in _simple(blocks):
        if isinstance(block, Rows):
            yield block.rows
        else:
            yield block.activations if isinstance(block, Factors) else block.tokens
            yield block.signals


def _holding(block: Block, ahead: Iterator[Tensor]) -> Any:
    """Give a block like this one with the next tensors."""
    if isinstance(block, Added):
        return Added(tuple([_holding(part, ahead) for part in block.parts]))
    if isinstance(block, Rows):
        return Rows(next(ahead))
    if isinstance(block, Factors):
        return dataclasses.replace(block, activations=next(ahead), signals=next(ahead))
    return dataclasses.replace(block, tokens=next(ahead), signals=next(ahead))
