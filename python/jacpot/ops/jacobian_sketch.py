"""Random projections of the rows of a Jacobian that is given as blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jacpot._backend import threads
from jacpot.ops.arrays import as_kind
from jacpot.ops.jacobian_blocks import (
    PANEL_BYTES,
    Block,
    Factors,
    Rows,
    check_blocks,
    row_panels,
)
from jacpot.ops.jacobian_kernels import kernels
from jacpot.ops.jacobian_products import add_jvp

__all__ = ["SketchKind", "sketch"]

SketchKind: TypeAlias = Literal["rademacher", "sparse"]

SPARSE_ENTRIES = 8  # of a row of a sparse random matrix
PANEL_ELEMENTS = 1 << 22  # of a random matrix that are held at once, about


def sketch(
    blocks: Sequence[Block],
    dim: int,
    seed: int = 0,
    offsets: Sequence[int] | None = None,
    kind: SketchKind = "rademacher",
    orders: Sequence[Tensor | None] | None = None,
) -> Any:
    """Compute ``J S`` for a seeded random ``S (P, dim)``.

    Norms and angles of rows are kept on average.

    Entry ``S[p, d]`` depends on ``seed``, ``p`` and ``d`` alone (a counter-based generator), so the
    result does not depend on how examples are batched or parameters are split into blocks.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.
    dim
        Columns of ``S``.
    seed
        Chooses ``S``, any 64-bit integer.
    offsets
        Where each block's columns begin among all parameters. None: one block after another.
    kind
        ``"rademacher"``: entries are signs over ``√dim`` (Achlioptas 2003). ``"sparse"``: a row has
        eight entries, signs over ``√8``, one in each eighth of the columns (Kane & Nelson 2014), so
        that the cost does not grow with ``dim``.
    orders
        For each block where among its parameters each of its columns goes, a permutation; None
        where they are in order.

    Returns
    -------
    array
        ``(N, K, dim)``.

    Raises
    ------
    ValueError
        If ``dim`` is not positive, ``kind`` is unknown, or there is not one entry of ``offsets``
        and ``orders`` for every block.

    Notes
    -----
    Achlioptas, Database-friendly random projections, 2003. Kane & Nelson, Sparser
    Johnson-Lindenstrauss transforms, 2014.

    Examples
    --------
    >>> import torch
    >>> sketch([Rows(torch.ones(1, 1, 1))], dim=4).abs()
    tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])
    """
    n, k, dtype = check_blocks(blocks)
    if dim < 1:
        raise ValueError(f"argument 'dim' must be at least 1, got {dim}")
    if kind not in ("rademacher", "sparse"):
        raise ValueError(f"argument 'kind' must be 'rademacher' or 'sparse', got {kind!r}")
    if offsets is None:
        ends = list(accumulate(b.n_parameters for b in blocks))
        offsets = [0, *ends[:-1]]
    if orders is None:
        orders = [None] * len(blocks)
    for name, given in (("offsets", offsets), ("orders", orders)):
        if len(given) != len(blocks):
            raise ValueError(
                f"argument {name!r} must hold one entry per block, {len(blocks)}, got {len(given)}"
            )
    out = torch.zeros(n, k, dim, dtype=dtype, device=blocks[0].device)
    key = (seed + 2**63) % 2**64 - 2**63
    add = _add_dense if kind == "rademacher" else _add_sparse
    for block, offset, order in zip(blocks, offsets, orders, strict=True):
        for examples, part in _in_order(block, order):
            add(part, key, offset, out[examples])
    entries = dim if kind == "rademacher" else min(SPARSE_ENTRIES, dim)
    return as_kind(out.mul_(entries**-0.5), blocks[0].kind)


def _in_order(block: Block, order: Tensor | None) -> Iterator[tuple[slice, Block]]:
    """Give the block with its columns in the order of parameters, some examples at a time."""
    if order is None:
        yield slice(None), block
        return
    place = order.argsort().to(block.device)
    row = max(1, block.n_outputs * block.n_parameters * block.dtype.itemsize)
    step = max(1, PANEL_BYTES // row if isinstance(block, Factors) else block.n_examples)
    for begin in range(0, block.n_examples, step):
        some, part = slice(begin, begin + step), block
        if isinstance(block, Factors):
            a, s = block.activations[some], block.signals[some]
            part = dataclasses.replace(block, activations=a, signals=s)
        yield some, Rows(torch.cat(list(row_panels(part)), 2)[:, :, place])


def _add_dense(block: Block, key: int, offset: int, out: Tensor) -> None:
    """``out (N, K, dim) += J S`` for the signs of a block whose first column is ``offset``."""
    dim, p = out.shape[2], block.n_parameters
    width = max(1, PANEL_ELEMENTS // max(1, p))
    for start in range(0, dim, width):
        signs = out.new_empty(min(width, dim - start), p)
        kernels(signs).jacobian_signs(key, offset, start, signs, threads())
        part = out.new_zeros(*out.shape[:2], len(signs))
        add_jvp(block, signs, part)
        out[:, :, start : start + width] += part


def _add_sparse(block: Block, key: int, offset: int, out: Tensor) -> None:
    """The same for the sparse signs."""
    rows = out.view(-1, out.shape[2])
    for panel in row_panels(block):
        part = panel.flatten(0, 1).contiguous()
        entries = min(SPARSE_ENTRIES, out.shape[2])
        kernels(rows).jacobian_sparse_sketch(part, key, offset, entries, rows, threads())
        offset += panel.shape[2]
