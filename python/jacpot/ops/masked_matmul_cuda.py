"""Products with a sparse weight on a GPU: how a pattern is walked, and the two calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot import _backend

__all__ = ["Walk", "dense_is_faster", "multiply", "multiply_and_sample"]

# The density from which a dense product takes less time, by the rates of sm_80 and sm_90: shared
# memory feeds a kernel 32 float32 a clock, while 64 or 128 dense multiply-adds are done; in 16
# bits it is 64 against 1024 or 2048 on the tensor cores, in float64 16 against 64 or more.
_DENSE_FROM = {
    torch.float32: 1 / 3,
    torch.float64: 1 / 6,
    torch.bfloat16: 1 / 24,
    torch.float16: 1 / 24,
}


def dense_is_faster(density: float, dtype: torch.dtype) -> bool:
    """Whether a dense product with the expanded weight is expected to take less time."""
    return density > _DENSE_FROM.get(dtype, 1.0)


@dataclass(frozen=True, eq=False)
class Walk:
    """The kept entries of a matrix row by row, prepared for the kernels of one device.

    Parameters
    ----------
    indices
        ``(nnz,)`` int32: column of each entry, rising within a row.
    order
        ``(rows,)`` int32: the rows by falling length, so that rows walked together end together.
    tile_offsets
        ``(rows, tiles + 1)`` int64: where each row's entries of each tile of columns begin.
    tile
        Columns of a tile.
    columns
        Columns of the matrix.
    """

    indices: Tensor
    order: Tensor
    tile_offsets: Tensor
    tile: int
    columns: int

    @classmethod
    def of(cls, offsets: Tensor, indices: Tensor, columns: int) -> Walk:
        """Prepare the walk of compressed rows: ``offsets (rows + 1,)``, ``indices (nnz,)``."""
        kernels, (device, stream) = _backend.cuda(), _backend.queue(offsets)
        offsets, indices = offsets.to(torch.int32), indices.to(torch.int32).contiguous()
        tile, _ = kernels.masked_matmul_plan("float32", columns, 1, False, device)
        order = offsets.diff().argsort(descending=True, stable=True).to(torch.int32)
        tiles = max(1, -(-columns // tile))
        tile_offsets = offsets.new_empty((len(order), tiles + 1), dtype=torch.int64)
        kernels.masked_matmul_tile_offsets(
            offsets.contiguous(), indices, columns, tile, tile_offsets, device, stream
        )
        return cls(indices, order, tile_offsets, tile, columns)


def multiply(
    walk: Walk, x: Tensor, values: Tensor, bias: Tensor | None, relu: bool, feature_major: bool
) -> Tensor:
    """Compute ``x (N, columns) @ S.T + bias``; row-major or, if so asked, of strides (1, N)."""
    product, _ = _run(walk, x, values, bias, relu, None)
    assert product is not None
    return _laid_out(product, x.dtype, feature_major)


def multiply_and_sample(
    walk: Walk, gathered: Tensor, values: Tensor | None, held: Tensor | None, feature_major: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute ``gathered (N, columns) @ S.T`` and, at the kept entries only, ``held.T @ gathered``.

    Either is left out where ``values``, or ``held (N, rows)``, is None. Both together take hardly
    longer than one.
    """
    product, sampled = _run(walk, gathered, values, None, False, held)
    return (
        None if product is None else _laid_out(product, gathered.dtype, feature_major),
        None if sampled is None else sampled,
    )


def _laid_out(product: Tensor, dtype: torch.dtype, feature_major: bool) -> Tensor:
    """Give ``(rows, N)`` as ``(N, rows)`` of the dtype; one pass at most."""
    if feature_major:
        return product.to(dtype).t()
    out = product.new_empty((product.shape[1], product.shape[0]), dtype=dtype)
    return out.copy_(product.t())


def _aligned(values: Tensor) -> Tensor:
    """Give contiguous memory at a multiple of 16 bytes: copies a view that begins elsewhere."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values


def _run(
    walk: Walk,
    gathered: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    held: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    kernels, (device, stream) = _backend.cuda(), _backend.queue(gathered)
    n, rows, nnz = gathered.shape[0], len(walk.order), len(walk.indices)
    wide = torch.float64 if gathered.dtype == torch.float64 else torch.float32
    name = str(gathered.dtype).removeprefix("torch.")
    _, splits = kernels.masked_matmul_plan(name, walk.columns, n, held is not None, device)
    product = sampled = None
    if values is not None:
        product = gathered.new_empty((rows, n), dtype=wide)
    if held is not None:
        # Entries of a batch of zero are sums of nothing, which no block writes.
        new = gathered.new_empty if n else gathered.new_zeros
        sampled = new((splits, nnz), dtype=wide)
    kernels.masked_matmul_walk(
        walk.indices,
        walk.order,
        walk.tile_offsets,
        walk.tile,
        splits,
        gathered.detach().t(),
        None if values is None else _aligned(values.detach()),
        None if bias is None else bias.detach().contiguous(),
        relu,
        product,
        None if held is None else held.detach().t().contiguous(),
        sampled,
        device,
        stream,
    )
    if sampled is not None:
        sampled = (sampled[0] if splits == 1 else sampled.sum(0)).to(gathered.dtype)
    return product, sampled
