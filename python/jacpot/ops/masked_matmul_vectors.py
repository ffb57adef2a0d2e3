"""Products with a very sparse weight in 16 bits on tensor cores, see vectors_cuda.hpp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot import _backend

__all__ = ["Vectors", "columns_first", "multiply_vectors"]

ROWS = 16  # of a window
VECTORS = 16  # of a block
BANKS = 8  # of 16 bytes, in shared memory


@dataclass(frozen=True, eq=False)
class Vectors:
    """A sparse matrix cut into windows of 16 rows, and these into vectors of 16 values.

    A column that holds anything in a window is a vector; 16 vectors of a tile of columns are a
    block. Inside a window and tile they come in an order in which neighbours lie in different banks
    of shared memory: first one vector of each bank, then the second one of each, and so on.

    Parameters
    ----------
    columns
        ``(blocks, 16)`` int16: column of each vector in its tile; ``tile`` where there is none.
    begins
        ``(windows, tiles + 1)`` int64: where each window's blocks of each tile begin.
    slots
        ``(nnz,)`` int64: where each kept value lies among those of all blocks, ``(blocks · 256,)``.
    tile
        Columns of a tile.
    """

    columns: Tensor
    begins: Tensor
    slots: Tensor
    tile: int

    @classmethod
    def of(cls, offsets: Tensor, indices: Tensor, columns: int) -> Vectors:
        """Cut compressed rows: ``offsets (rows + 1,)``, ``indices (nnz,)``; waits for the GPU."""
        device, rows, nnz = indices.device, len(offsets) - 1, len(indices)
        tile = _backend.cuda().masked_matmul_vector_tile(columns, _backend.queue(offsets)[0])
        tiles, windows = max(1, -(-columns // tile)), -(-rows // ROWS)

        def count(n: int) -> Tensor:
            return torch.arange(n, device=device)

        row = torch.repeat_interleave(count(rows), offsets.diff().long(), output_size=nnz)
        key, vector = torch.unique(row // ROWS * columns + indices, return_inverse=True)
        column = key % max(1, columns)
        group = key // max(1, columns) * tiles + column // tile  # a window's part of a tile
        local = column % tile

        bank = group * BANKS + local % BANKS
        order = bank.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = count(len(order)) - torch.searchsorted(bank[order], bank[order])
        order = ((group * tile + rank) * BANKS + local % BANKS).argsort()
        place = torch.empty_like(order)
        place[order] = count(len(order)) - torch.searchsorted(group[order], group[order])

        sizes = torch.bincount(group, minlength=windows * tiles)
        blocks_of_group = (sizes + VECTORS - 1) // VECTORS
        begins = torch.cat([blocks_of_group.new_zeros(1), blocks_of_group.cumsum(0)])
        block, inside = begins[group] + place // VECTORS, place % VECTORS
        block_columns = torch.full(
            (int(begins[-1]), VECTORS), tile, dtype=torch.int16, device=device
        )
        block_columns[block, inside] = local.to(torch.int16)

        r, v = row % ROWS, inside[vector]
        in_block = r % 8 * 32 + v % 8 // 2 * 8 + r // 8 * 2 + v // 8 * 4 + v % 2
        slots = block[vector] * (ROWS * VECTORS) + in_block
        by_window = count(windows)[:, None] * tiles + count(tiles + 1)
        return cls(block_columns, begins[by_window], slots, tile)


def multiply_vectors(
    vectors: Vectors, x: Tensor, values: Tensor, bias: Tensor | None, relu: bool, out: Tensor
) -> Tensor:
    """Write ``x (N, columns) @ S.T + bias`` into ``out (N, rows)`` of any strides."""
    in_place = values.new_zeros(len(vectors.columns) * ROWS * VECTORS)
    in_place.index_copy_(0, vectors.slots, values.detach())
    _backend.cuda().masked_matmul_vectors(
        vectors.columns,
        vectors.begins,
        vectors.tile,
        in_place.view(-1, ROWS * VECTORS),
        columns_first(x.detach()),
        None if bias is None else bias.detach().contiguous(),
        relu,
        out.t(),
        *_backend.queue(x),
    )
    return out


def columns_first(x: Tensor) -> Tensor:
    """Give ``x (N, columns)`` as (columns, N), N rounded up to eight: a copy unless it is so."""
    n, columns = x.shape
    # the only column of a matrix counts as contiguous whatever its stride is
    if n % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 and x.t().is_contiguous():
        return x.t()
    out = x.new_empty(columns, -(-n // 8) * 8)
    out[:, :n] = x.t()
    return out
