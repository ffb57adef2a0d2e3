"""Products with a sparse weight on a GPU: the CUDA side of :mod:`jacpot.ops.masked_matmul`.

The first use of a pattern on a device prepares it there and waits for the device once; after that
nothing waits, and products of fixed sizes can be captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from jacpot import _backend
from jacpot.ops.masked_matmul_slots import Slots, columns_first, multiply_slots

__all__ = ["Walk", "dense_is_faster", "multiply", "multiply_and_sample", "prepare"]

# The density from which a dense product takes less time, by the rates of sm_80 and sm_90: shared
# memory feeds a multiprocessor 32 float32 a clock, of which a fifth goes to other things, while 64
# or 128 dense multiply-adds are done; in 16 bits it is 64 against 1024 or 2048 on the tensor cores,
# in float64 16 against 64 or 128. Counted, not measured.
_DENSE_FROM = {
    torch.float32: 1 / 4,
    torch.float64: 1 / 6,
    torch.bfloat16: 1 / 24,
    torch.float16: 1 / 24,
}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

RUN = 8  # rows that stay together
CHUNKS = 16  # of 16 bytes, of a column's piece of the batch in shared memory
BANKS = 8  # of as many bytes


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
    places
        ``(nnz,)`` int16: where each entry's column lies in its tile, in 16 bytes of shared memory.
    run_order
        ``(rows / 8,)`` int32: runs of eight rows by falling length, to be dealt to blocks in turns.
    tile_offsets
        ``(rows, tiles + 1)`` int32: where each row's entries of each tile of columns begin.
    tile
        Columns of a tile.
    columns
        Columns of the matrix.
    """

    indices: Tensor
    places: Tensor
    run_order: Tensor
    tile_offsets: Tensor
    tile: int
    columns: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return len(self.tile_offsets)

    @cached_property
    def slots(self) -> Slots:
        """The same matrix, prepared for tensor cores."""
        offsets = torch.cat([self.tile_offsets[:, 0], self.tile_offsets[-1:, -1]])
        slots = Slots.of(offsets, self.indices, self.columns)
        _backend.settle(slots.sources)
        return slots

    @classmethod
    def of(cls, offsets: Tensor, indices: Tensor, columns: int) -> Walk:
        """Prepare the walk of compressed rows: ``offsets (rows + 1,)``, ``indices (nnz,)``."""
        kernels, (device, stream) = _backend.cuda(), _backend.queue(offsets)
        offsets = offsets.to(torch.int32).contiguous()
        indices = indices.to(torch.int32).contiguous()
        tile, rows = kernels.masked_matmul_tile(columns, device), len(offsets) - 1
        local = indices % tile
        places = (local * CHUNKS + local % BANKS).to(torch.int16)
        begins = offsets[torch.arange(0, rows + RUN, RUN, device=offsets.device).clamp_max(rows)]
        run_order = begins.diff().argsort(descending=True, stable=True).to(torch.int32)
        tile_offsets = offsets.new_empty((rows, max(1, -(-columns // tile)) + 1))
        kernels.masked_matmul_tile_offsets(
            offsets, indices, columns, tile, tile_offsets, device, stream
        )
        return cls(indices, places, run_order, tile_offsets, tile, columns)


def _fastest(walk: Walk, n: int, dtype: torch.dtype) -> str:
    """Name the way to a product that is expected to take the least time.

    In 16 bits, clocks of a multiprocessor are counted for 64 examples: dense, as above; walking,
    about 20 instructions for an entry and 128 examples, of which it begins four a clock; by slots,
    the 16 reads of shared memory of a block and about three for its entries, a tenth of which is
    waited for, and 4.5 for 128 bytes of each column from the L2 cache, which gives 28 a clock, for
    512 rows; both go on at the same time. Once for all examples every slot is read and written by
    16 bytes. Counted, not measured.
    """
    rows, nnz, n = walk.rows, len(walk.indices), max(64, n)
    density = nnz / max(1, rows * walk.columns)
    if dtype not in _SIXTEEN_BITS:
        return "dense" if dense_is_faster(density, dtype) else "walk"
    if density > 2 * _DENSE_FROM[dtype]:
        return "dense"
    blocks = walk.slots.blocks
    clocks = {
        "dense": rows * walk.columns * _DENSE_FROM[dtype],
        "walk": nnz * 2.5,
        "slots": max(blocks * 21, -(-rows // 512) * walk.columns * 4.5) + blocks * 9 * 64 / n,
    }
    return min(clocks, key=lambda name: clocks[name])


def multiply(
    walk: Walk, x: Tensor, values: Tensor, bias: Tensor | None, relu: bool, feature_major: bool
) -> Tensor:
    """Compute ``x (N, columns) @ S.T + bias``; row-major or, if so asked, of strides (1, N)."""
    product, _ = _run(walk, x, values, bias, relu, None, feature_major)
    assert product is not None
    return product


def multiply_and_sample(
    walk: Walk, gathered: Tensor, values: Tensor | None, held: Tensor | None, feature_major: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute ``gathered (N, columns) @ S.T`` and, at the kept entries only, ``held.T @ gathered``.

    Either is left out where ``values``, or ``held (N, rows)``, is None. Both together take hardly
    longer than one.
    """
    return _run(walk, gathered, values, None, False, held, feature_major)


def _run(
    walk: Walk,
    gathered: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    held: Tensor | None,
    feature_major: bool,
) -> tuple[Tensor | None, Tensor | None]:
    kernels, queue = _backend.cuda(), _backend.queue(gathered)
    gathered, n = gathered.detach(), len(gathered)
    product = sampled = None
    if values is not None:
        product = _empty(gathered, walk.rows, feature_major)
    if held is not None:
        wide = torch.float64 if gathered.dtype == torch.float64 else torch.float32
        name = str(gathered.dtype).removeprefix("torch.")
        # Entries of a batch of zero are sums of nothing, which no block writes.
        new = gathered.new_empty if n else gathered.new_zeros
        sampled = new((kernels.masked_matmul_splits(name, n), len(walk.indices)), dtype=wide)
    kernels.masked_matmul_walk(
        walk.places,
        walk.run_order,
        walk.tile_offsets,
        walk.tile,
        columns_first(gathered)[:, :n] if gathered.dtype in _SIXTEEN_BITS else gathered.t(),
        None if values is None else values.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
        relu,
        None if product is None else product.t(),
        None if held is None else held.detach().t().contiguous(),
        sampled,
        *queue,
    )
    if sampled is not None:
        sampled = (sampled[0] if len(sampled) == 1 else sampled.sum(0)).to(gathered.dtype)
    return product, sampled


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What the kernels of one device need of a pattern."""

    shape: tuple[int, int]
    rows: Walk  # of the weight, for the product
    columns: Walk  # of its transpose, for the gradients
    permutation: Tensor  # (nnz,) int64: entry in column order -> its place in row order
    kept: Tensor  # (nnz,) int64: flat index of each entry, in row order

    @property
    def density(self) -> float:
        return len(self.kept) / max(1, self.shape[0] * self.shape[1])


_prepared: Any = WeakTensorKeyDictionary()


def prepare(pattern: Tensor) -> _Prepared:
    """Give what the kernels need of a compiled pattern (:attr:`jacpot.Pattern.block`)."""
    known: _Prepared | None = _prepared.get(pattern)
    if known is None:
        known = _prepare(pattern)
        _backend.settle(pattern)
        _prepared[pattern] = known
    return known


def _prepare(pattern: Tensor) -> _Prepared:
    layout = _backend.core.describe_pattern(pattern.cpu())
    (rows, columns), nnz = layout["shape"], layout["nnz"]

    def section(name: str, count: int, element_bytes: int = 4) -> Tensor:
        part = pattern[layout[name] : layout[name] + count * element_bytes]
        if element_bytes == 4:
            return part.view(torch.int32)
        return part.view(torch.int16).to(torch.int32) & 0xFFFF  # uint16 has few operators

    indices = section("column_indices", nnz, layout["column_index_bytes"])
    offsets = section("row_offsets", rows + 1)
    lines = torch.arange(rows, dtype=torch.int32, device=pattern.device)
    row_indices = torch.repeat_interleave(lines, offsets.diff().long(), output_size=nnz)
    permutation = torch.argsort(indices, stable=True)
    return _Prepared(
        (rows, columns),
        Walk.of(offsets, indices, columns),
        Walk.of(section("column_offsets", columns + 1), row_indices[permutation], rows),
        permutation,
        row_indices.long() * columns + indices,
    )


def _expect_device(pattern: Tensor, **arguments: Tensor | None) -> None:
    for name, argument in arguments.items():
        if argument is not None and argument.device != pattern.device:
            raise ValueError(
                f"argument {name!r} must be on {pattern.device} like the pattern, "
                f"got {argument.device}"
            )


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Tensor,
    out_features: int,
    relu: bool,
    feature_major: bool,
) -> Tensor:
    _expect_device(pattern, x=x, values=values, bias=bias)
    prepared = prepare(pattern)
    way = _fastest(prepared.rows, len(x), x.dtype)
    if way == "walk":
        return multiply(prepared.rows, x, values, bias, relu, feature_major)
    if way == "slots":
        out = _empty(x, out_features, feature_major)
        return multiply_slots(prepared.rows.slots, x, values, bias, relu, out)
    weight = _scatter(values, prepared)
    if feature_major:
        y = (weight @ x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    y = y.relu_() if relu else y
    return y.t() if feature_major else y


def _backward(
    dy: Tensor, x: Tensor, values: Tensor, pattern: Tensor, want_x: bool, want_values: bool
) -> tuple[Tensor, Tensor]:
    _expect_device(pattern, dy=dy, x=x, values=values)
    prepared = prepare(pattern)
    feature_major = x.stride(0) == 1 and x.stride(1) != 1
    nothing = x.new_empty(0)
    if want_x and not want_values:  # a product of its own, with the transpose
        way = _fastest(prepared.columns, len(dy), dy.dtype)
        if way == "slots":
            by_column = values.index_select(0, prepared.permutation)
            out = _empty(dy, prepared.shape[1], feature_major)
            return multiply_slots(prepared.columns.slots, dy, by_column, None, False, out), nothing
    if dense_is_faster(prepared.density, x.dtype):
        dx = nothing
        if want_x:
            weight = _scatter(values, prepared)
            dx = (weight.t() @ dy.t()).t() if feature_major else dy @ weight
        return dx, _gather(dy.t() @ x, prepared) if want_values else nothing
    product, sampled = multiply_and_sample(
        prepared.columns,
        dy,
        values.index_select(0, prepared.permutation) if want_x else None,
        x if want_values else None,
        feature_major,
    )
    d_values = nothing
    if sampled is not None:
        d_values = torch.empty_like(values).index_copy_(0, prepared.permutation, sampled)
    return nothing if product is None else product, d_values


def _empty(like: Tensor, columns: int, feature_major: bool) -> Tensor:
    if feature_major:
        return like.new_empty(columns, len(like)).t()
    return like.new_empty(len(like), columns)


def _gather(weight: Tensor, prepared: _Prepared) -> Tensor:
    return weight.reshape(-1).index_select(0, prepared.kept)


def _scatter(values: Tensor, prepared: _Prepared) -> Tensor:
    rows, columns = prepared.shape
    weight = values.new_zeros(rows * columns)
    return weight.index_copy_(0, prepared.kept, values).view(rows, columns)


def _compress(weight: Tensor, pattern: Tensor, nnz: int) -> Tensor:
    _expect_device(pattern, weight=weight)
    prepared = prepare(pattern)
    if weight.shape != prepared.shape:
        raise ValueError(
            f"argument 'weight' must have shape {prepared.shape}, got {tuple(weight.shape)}"
        )
    return _gather(weight, prepared)


def _expand(values: Tensor, pattern: Tensor, rows: int, columns: int) -> Tensor:
    _expect_device(pattern, values=values)
    prepared = prepare(pattern)
    if values.shape != prepared.kept.shape:
        raise ValueError(
            f"argument 'values' must have shape {tuple(prepared.kept.shape)}, "
            f"got {tuple(values.shape)}"
        )
    return _scatter(values, prepared)


# Untyped in PyTorch.
_Library: Any = torch.library.Library
_library = _Library("jacpot", "IMPL", "CUDA")
_library.impl("masked_matmul", _forward)
_library.impl("masked_matmul_backward", _backward)
_library.impl("compress", _compress)
_library.impl("expand", _expand)
