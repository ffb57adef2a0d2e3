"""Products, Gram matrices, norms and sketches of a Jacobian that is given as blocks.

A Jacobian ``J (N, K, P)`` is a sequence of blocks side by side: :class:`Factors` of a layer,
:class:`Lookup` of an embedding, :class:`Added` of a parameter that is both, or :class:`Rows`. No
function but :func:`dense` forms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import empty, threads
from jacpot.ops.arrays import as_kind
from jacpot.ops.jacobian_blocks import (
    Added,
    Block,
    Factors,
    Lookup,
    Rows,
    check_blocks,
    row_panels,
)
from jacpot.ops.jacobian_gram import Outputs, Precision, gram
from jacpot.ops.jacobian_kernels import kernels
from jacpot.ops.jacobian_products import joined_vjp, jvp, vjp
from jacpot.ops.jacobian_sketch import SketchKind, sketch

__all__ = [
    "Added",
    "Block",
    "Factors",
    "Lookup",
    "Outputs",
    "Precision",
    "Rows",
    "SketchKind",
    "column_norms",
    "dense",
    "gram",
    "joined_vjp",
    "jvp",
    "row_norms",
    "sketch",
    "vjp",
]


def dense(blocks: Sequence[Block]) -> Any:
    """Form ``J`` itself.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.

    Returns
    -------
    array
        ``(N, K, P)``, of the kind that the blocks were given as.

    Examples
    --------
    >>> import torch
    >>> a, s = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> dense([Factors(a.reshape(1, 1, 1, 2), s.reshape(1, 1, 1, 1, 2))])
    tensor([[[3., 6., 4., 8.]]])
    """
    n, k, _ = check_blocks(blocks)
    out = empty((n, k, sum(b.n_parameters for b in blocks)), blocks[0])
    start = 0
    for block in blocks:
        weights = _write_rows(block, out, start)
        for panel in row_panels(block, weights=not weights):
            first = start + weights
            out[:, :, first : first + panel.shape[2]] = panel
            start += panel.shape[2]
        start += weights
    return as_kind(out, blocks[0].kind)


def _write_rows(block: Block, out: Tensor, start: int) -> int:
    """Write a weight's columns straight into ``out`` where they need no selection; say how many."""
    if not isinstance(block, Factors) or block.pattern is not None or not block.n_weights:
        return 0
    if out.numel():
        kernels(out).jacobian_rows(block.for_rows, out, start, threads())
    return block.n_weights


def row_norms(blocks: Sequence[Block]) -> Any:
    """Compute the Euclidean norm of every row of ``J``.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.

    Returns
    -------
    array
        ``(N, K)``, of the kind that the blocks were given as.

    Examples
    --------
    >>> import torch
    >>> row_norms([Rows(torch.tensor([[[3.0, 4.0]]]))])
    tensor([[5.]])
    """
    n, k, dtype = check_blocks(blocks)
    total = torch.zeros(n, k, 1, dtype=dtype, device=blocks[0].device)
    for block in blocks:
        if isinstance(block, Factors) and block.n_positions == 1:
            # J[n,k,e]² = δ² a², so that the squares' sum is a product with ones.
            squares = block.operands[0].square()
            if block.pattern is None:
                squares = squares.sum(3, keepdim=True)
            count = block.n_parameters if block.pattern is not None else _units(block)
            ones = torch.ones(1, count, dtype=dtype, device=block.device)
            factors = squares, block.operands[1]
            kernels(total).jacobian_jvp(
                factors, *block.layout, block.bias, True, ones, total, threads()
            )
        elif isinstance(block, Lookup):
            total[:, :, 0] += block.row_squares()
        else:
            for panel in row_panels(block):
                total[:, :, 0] += panel.square().sum(2)
    return as_kind(total[:, :, 0].sqrt(), blocks[0].kind)


def _units(block: Factors) -> int:
    return block.shape[0] * block.shape[1] * (2 if block.bias else 1)


def column_norms(blocks: Sequence[Block]) -> Any:
    """Compute the Euclidean norm of every column of ``J``.

    Their squares are the diagonal of ``JᵀJ``.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.

    Returns
    -------
    array
        ``(P,)``, of the kind that the blocks were given as.

    Examples
    --------
    >>> import torch
    >>> column_norms([Rows(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))])
    tensor([5., 1.])
    """
    n, k, dtype = check_blocks(blocks)
    parts = [torch.empty(0, dtype=dtype, device=blocks[0].device)]
    for block in blocks:
        if isinstance(block, Factors) and block.n_positions == 1:
            factors = block.operands[0].square(), block.operands[1]
            ones, out = (
                torch.ones(n, k, 1, dtype=dtype, device=block.device),
                torch.empty(1, block.n_parameters, dtype=dtype, device=block.device),
            )
            kernels(out).jacobian_vjp(
                factors, *block.layout, block.bias, True, ones, out, threads()
            )
            parts.append(out[0].sqrt_())
        elif isinstance(block, Lookup):
            parts.append(block.column_squares().sqrt())
        else:
            parts += [panel.square().sum((0, 1)).sqrt() for panel in row_panels(block)]
    return as_kind(torch.cat(parts), blocks[0].kind)
