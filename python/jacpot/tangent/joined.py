"""The Jacobians of successive examples as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import empty
from jacpot.ops import jacobian as kernels
from jacpot.ops.jacobian import Block
from jacpot.tangent.factored import Jacobian
from jacpot.tangent.pieces import stacked
from jacpot.tangent.room import in_a_row

__all__ = ["joined"]


def joined(parts: Sequence[Jacobian]) -> Jacobian:
    """Join the Jacobians of successive examples into one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    outputs = torch.cat([part.outputs for part in parts])
    if all(first._matches(part) and _as_long(first, part) for part in parts):
        blocks = [_joined_block(same) for same in zip(*(p.blocks for p in parts), strict=True)]
        return Jacobian(outputs, blocks, first._columns, first._orders, first.output_shape)
    blocks, orders = stacked([part._pieces() for part in parts])
    return Jacobian(outputs, blocks, first._columns, orders, first.output_shape)


def _as_long(a: Jacobian, b: Jacobian) -> bool:
    """Whether blocks that match have as many positions."""
    return all(
        isinstance(p, kernels.Rows) or isinstance(q, kernels.Rows) or p.n_positions == q.n_positions
        for p, q in zip(_parts(a.blocks), _parts(b.blocks), strict=True)
    )


def _parts(blocks: Sequence[Block]) -> Iterator[kernels.Factors | kernels.Lookup | kernels.Rows]:
    for block in blocks:
        yield from block.parts if isinstance(block, kernels.Added) else (block,)


def _joined_block(parts: Sequence[Block]) -> Any:
    first = parts[0]
    if isinstance(first, kernels.Factors):
        return kernels.Factors(
            _stacked([p.activations for p in parts if isinstance(p, kernels.Factors)]),
            _stacked([p.signals for p in parts if isinstance(p, kernels.Factors)]),
            first.pattern,
            first.bias,
        )
    if isinstance(first, kernels.Lookup):
        return kernels.Lookup(
            torch.cat([p.tokens for p in parts if isinstance(p, kernels.Lookup)]),
            _stacked([p.signals for p in parts if isinstance(p, kernels.Lookup)]),
            first.n_tokens,
            first.kept,
        )
    if isinstance(first, kernels.Added):
        each = zip(*[p.parts for p in parts if isinstance(p, kernels.Added)], strict=True)
        return kernels.Added(tuple(_joined_block(same) for same in each))
    return kernels.Rows(_stacked([p.rows for p in parts if isinstance(p, kernels.Rows)]))


def _stacked(parts: list[Tensor]) -> Tensor:
    first, whole = parts[0], in_a_row(parts)
    if whole is not None:
        return whole
    out = empty((sum(len(part) for part in parts), *first.shape[1:]), like=first)
    return torch.cat(parts, out=out)
