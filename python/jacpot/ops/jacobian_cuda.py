"""The kernels of :mod:`jacpot.ops.jacobian` on a GPU, under the names of those on the CPU.

Plain products of matrices are cuBLAS's. What is ours is what it has not: the fused Gram matrix, the
products with sparse weights, the signs of a sketch.

Nothing here waits for the device but the first use of a pattern by the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from jacpot import _backend
from jacpot.ops import masked_matmul_cuda as sparse

__all__ = [
    "jacobian_add_row_products",
    "jacobian_gram",
    "jacobian_jvp",
    "jacobian_mirror",
    "jacobian_rows",
    "jacobian_signs",
    "jacobian_sparse_sketch",
    "jacobian_vjp",
    "jacobian_windows",
    "matmul_precision",
]

Pair: TypeAlias = tuple[Tensor, Tensor]  # activations (N, T, G, I), signals (N, K, T, G, O)
Layer: TypeAlias = tuple[Pair, Pair | None, Tensor | None, Tensor | None, bool]

PANEL_BYTES = 256 << 20  # of intermediate results that are held at once, about
SKETCHED = 1 << 18  # parameters whose entries of a sparse random matrix are held at once


def jacobian_gram(
    layers: Sequence[Layer], outputs: str, out: Tensor, threads: int, precision: str = "exact"
) -> None:
    """Write the fused Gram matrix of layers that are given as factors."""
    whole = [(left, right, bias) for left, right, offsets, _, bias in layers if offsets is None]
    if whole:
        _backend.cuda().jacobian_gram(whole, outputs, precision, out, *_backend.queue(out))
    else:
        out.zero_()
    masked = [layer for layer in layers if layer[2] is not None]
    for layer in masked:
        _add_masked(layer, outputs, out)
    if masked and layers[0][1] is None:  # plain products need not round the two triangles alike
        _mirror(out, outputs)


def _add_masked(layer: Layer, outputs: str, out: Tensor) -> None:
    """Add a layer whose output units keep inputs of their own, a panel of units at a time."""
    (a, s), right, offsets, columns, bias = layer
    assert offsets is not None
    assert columns is not None
    b, d = (a, s) if right is None else right
    (n, t, g, i), m, o = a.shape, len(b), s.shape[4]
    kept = _inputs_of_units(offsets, columns, i)
    longest = kept.shape[1]
    step = max(1, PANEL_BYTES // (a.element_size() * max(1, n * m + (n + m) * longest)))

    def gathered(x: Tensor, position: int, group: int, units: slice) -> Tensor:
        inputs = torch.cat([x[:, position, group], x.new_zeros(len(x), 1)], 1).T.contiguous()
        return inputs[kept[group * o : (group + 1) * o][units]]  # (units, longest, N)

    for group in range(g):
        for left in range(t):
            for other in range(t):
                for start in range(0, o, step):
                    units = slice(start, min(o, start + step))
                    x = gathered(a, left, group, units)
                    y = x
                    if b is not a or other != left:
                        y = gathered(b, other, group, units)
                    with matmul_precision("exact"):
                        products = torch.bmm(x.transpose(1, 2), y)
                    if bias:
                        products += 1
                    signals = s[:, :, left, group, units], d[:, :, other, group, units]
                    _add_units(products, *signals, outputs, right is None, out)


_inputs: Any = WeakTensorKeyDictionary()


def _inputs_of_units(offsets: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """Which inputs each unit keeps, (units, most); behind them, one that is zero.

    The first use of a pattern waits for the device, which knows how many are most.
    """
    known: Tensor | None = _inputs.get(offsets)
    if known is not None:
        return known
    counts = offsets.diff()
    units = torch.arange(len(counts), device=offsets.device)
    kept = torch.full(
        (len(counts), int(counts.max()) if len(counts) else 0), inputs, device=offsets.device
    )
    unit = torch.repeat_interleave(units, counts, output_size=len(columns))
    places = torch.arange(len(columns), device=offsets.device) - offsets[unit]
    kept[unit, places] = columns.long()
    _backend.settle(kept)
    _inputs[offsets] = kept
    return kept


def _add_units(
    products: Tensor, left: Tensor, right: Tensor, outputs: str, symmetric: bool, out: Tensor
) -> None:
    """``out += Σ_u products[u] · left[:, :, u] · right[:, :, u]`` for the outputs asked for.

    Products (U, N, M), signals (N, K, U) and (M, K, U).
    """
    k = left.shape[1]
    if outputs == "full" and k > 1:
        _backend.cuda().jacobian_add_units(
            products, left, right, symmetric, out, *_backend.queue(out)
        )
    elif outputs == "diagonal":
        for j in range(k):
            each = left[:, j].T[:, :, None] * right[:, j].T[:, None, :]
            out[:, :, j] += each.mul_(products).sum(0)
    else:
        with matmul_precision("exact"):
            each = torch.bmm(left.permute(2, 0, 1), right.permute(2, 1, 0))
        out.view(products.shape[1:]).add_(each.mul_(products).sum(0))


def _mirror(out: Tensor, outputs: str) -> None:
    if outputs == "diagonal":
        upper = out.permute(2, 0, 1).triu()
        out.copy_((upper + upper.triu(1).transpose(1, 2)).permute(1, 2, 0))
    else:
        rows = len(out) if outputs == "trace" else out.shape[0] * out.shape[1]
        jacobian_mirror(out.view(rows, rows), 1)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let plain products of float32 run on tensor cores, rounded to TF32, or exactly."""
    matmul: Any = torch.backends.cuda.matmul
    wanted: Any = precision == "tf32"
    name = "allow_tf32"
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9: used once, the older way fails
        name, wanted = "fp32_precision", "tf32" if wanted else "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def jacobian_mirror(out: Tensor, threads: int) -> None:
    """Copy the upper triangle to the lower."""
    _backend.cuda().jacobian_mirror(out, *_backend.queue(out))


def jacobian_signs(seed: int, offset: int, first: int, out: Tensor, threads: int) -> None:
    """Draw the signs of parameters ``offset...`` and columns ``first...``: the same as on a CPU."""
    _backend.cuda().jacobian_signs(seed, offset, first, out, *_backend.queue(out))


def jacobian_sparse_sketch(
    rows: Tensor, seed: int, offset: int, nonzeros: int, out: Tensor, threads: int
) -> None:
    """``out (m, dim) += rows (m, p) · S`` for the sparse S of the CPU's kernel, sign by sign.

    S is sorted by columns and multiplied as a sparse weight: sums have an order, without atomics.
    """
    dim = out.shape[1]
    for start in range(0, rows.shape[1], SKETCHED):
        part = rows[:, start : start + SKETCHED]
        count = part.shape[1]
        entries, signs = _sparse_entries(
            seed, offset + start, count, nonzeros, dim, rows.device, rows.dtype
        )
        parameters = torch.arange(count, device=rows.device).repeat_interleave(nonzeros)
        key, order = (entries * count + parameters).sort()
        begins = torch.arange(dim + 1, device=rows.device) * count
        walk = sparse.Walk.of(torch.searchsorted(key, begins), key % count, count)
        out += sparse.multiply(walk, part, signs[order], None, False, False)


def _sparse_entries(
    seed: int,
    offset: int,
    count: int,
    nonzeros: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Columns and signs of the entries of parameters ``offset...``, (count · nonzeros,) each."""
    own = _mix(torch.arange(count, device=device) + _wrapped(seed + offset))
    places = torch.arange(nonzeros, device=device)
    bits = _mix(own[:, None] + places)
    begin = dim * places // nonzeros
    size = dim * (places + 1) // nonzeros - begin
    inside = (_shift(bits, 32) * size) >> 32
    return (begin + inside).flatten(), (1 - 2 * (bits & 1)).to(dtype).flatten()


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, as in csrc/jacobian/signs.cpp, of int64 in place of uint64."""
    z = z + _wrapped(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrapped(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def jacobian_add_row_products(
    left: Tensor, right: Tensor | None, out: Tensor, threads: int
) -> None:
    """``out += left · rightᵀ``; without a right one, right on and above the diagonal."""
    other = left if right is None else right
    if right is not None:
        out.addmm_(left, other.T)
        return
    # In stripes, so that little is computed of the half that is not wanted.
    rows = len(left)
    step = max(512, -(-rows // 8))
    for start in range(0, rows, step):
        stripe = slice(start, start + step)
        out[stripe, start:].addmm_(left[stripe], left[start:].T)


def jacobian_rows(factors: Pair, out: Tensor, offset: int, threads: int) -> None:
    """Write the columns of an unmasked weight into ``out (N, K, P)``."""
    a, s = factors
    (n, k, t, g, o), i = s.shape, a.shape[3]
    view = out.as_strided(
        (n, k, g, o, i),
        (out.stride(0), out.stride(1), o * i, i, 1),
        out.storage_offset() + offset,
    )
    if t == 1:
        torch.mul(s[:, :, 0, :, :, None], a[:, None, 0, :, None, :], out=view)
        return
    for group in range(g):
        left = s[:, :, :, group].transpose(2, 3).reshape(n, k * o, t)
        view[:, :, group] = torch.bmm(left, a[:, :, group]).view(n, k, o, i)


def jacobian_windows(x: Tensor, places: Tensor, offsets: Tensor, out: Tensor, threads: int) -> None:
    """Write ``out (N, T, I)``, the elements of each example at places (T,) + offsets (I,)."""
    index = (places[:, None] + offsets).flatten()
    torch.index_select(x.flatten(1), 1, index, out=out.flatten(1))


def _chunks(n: int, bytes_of_one: int) -> list[slice]:
    step = max(1, PANEL_BYTES // max(1, bytes_of_one))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def _dense_weight(v: Tensor, offsets: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """Put kept weights ``(R, nnz)`` into ``(R, G·O, I)``."""
    units, nnz = len(offsets) - 1, len(columns)
    rows = torch.arange(units, device=v.device)
    flat = torch.repeat_interleave(rows, offsets.diff(), output_size=nnz) * inputs + columns
    weight = v.new_zeros(len(v), units * inputs)
    return weight.index_copy_(1, flat, v).view(len(v), units, inputs)


def _walks(offsets: Tensor | None, columns: Tensor | None, a: Tensor, units: int) -> bool:
    """Whether products go over kept weights one by one, not over the expanded weight."""
    if offsets is None or columns is None or a.shape[2] != 1:
        return False
    return not sparse.dense_is_faster(len(columns) / max(1, units * a.shape[3]), a.dtype)


def jacobian_jvp(
    factors: Pair,
    row_offsets: Tensor | None,
    columns: Tensor | None,
    bias: bool,
    squared: bool,
    vectors: Tensor,
    out: Tensor,
    threads: int,
) -> None:
    """``out (N, K, R) += J · vectors (R, P)ᵀ``; with ``squared``, of δ² in place of δ."""
    a, s = factors
    n, t, g, i = a.shape
    k, o, r = s.shape[1], s.shape[4], len(vectors)
    weights = g * o * i if columns is None else len(columns)
    walk = weight = None
    if row_offsets is None or columns is None:
        weight = vectors[:, :weights].reshape(r, g, o, i)
    elif _walks(row_offsets, columns, a, g * o):
        walk = sparse.Walk.of(row_offsets, columns, i)
    else:
        dense = _dense_weight(vectors[:, :weights].contiguous(), row_offsets, columns, i)
        weight = dense.view(r, g, o, i)
    for part in _chunks(n, t * g * o * r * a.element_size()):
        x = a[part]
        if walk is not None:
            flat = x.reshape(len(x) * t * g, i)
            each = flat.new_empty(len(flat), o, r)
            for j, v in enumerate(vectors):
                each[:, :, j] = sparse.multiply(walk, flat, v[:weights], None, False, False)
            z = each.view(len(x), t, g, o, r)
        else:
            z = torch.einsum("ntgi,rgoi->ntgor", x, weight)
        if bias:
            z = z + vectors[:, weights:].T.reshape(g, o, r)
        d = s[part].square() if squared else s[part]
        out[part] += torch.bmm(d.reshape(len(x), k, t * g * o), z.reshape(len(x), t * g * o, r))


def jacobian_vjp(
    factors: Pair,
    row_offsets: Tensor | None,
    columns: Tensor | None,
    bias: bool,
    squared: bool,
    u: Tensor,
    out: Tensor,
    threads: int,
) -> None:
    """``out (R, P) = uᵀ J`` for ``u (N, K, R)``; with ``squared``, of δ² in place of δ."""
    a, s = factors
    n, t, g, i = a.shape
    k, o, r = s.shape[1], s.shape[4], u.shape[2]
    weights = g * o * i if columns is None else len(columns)
    walk = kept = None
    if row_offsets is not None and columns is not None:
        if _walks(row_offsets, columns, a, g * o):
            walk = sparse.Walk.of(row_offsets, columns, i)
        else:
            rows = torch.arange(g * o, device=a.device)
            rows = torch.repeat_interleave(rows, row_offsets.diff(), output_size=weights)
            kept = rows * i + columns
    out.zero_()
    for part in _chunks(n, t * g * o * r * a.element_size()):
        x, d = a[part], s[part].square() if squared else s[part]
        w = torch.bmm(u[part].transpose(1, 2), d.reshape(len(x), k, t * g * o))
        w = w.view(len(x), r, t, g, o)
        if walk is not None:
            flat = x.reshape(len(x) * t * g, i)
            for j in range(r):
                held = w[:, j].reshape(len(x) * t, g * o)
                sampled = sparse.multiply_and_sample(walk, flat, None, held, False)[1]
                assert sampled is not None
                out[j, :weights] += sampled
        else:
            weight = torch.einsum("nrtgo,ntgi->rgoi", w, x).reshape(r, g * o * i)
            out[:, :weights] += weight if kept is None else weight.index_select(1, kept)
        if bias:
            out[:, weights:] += w.sum((0, 2)).reshape(r, g * o)
