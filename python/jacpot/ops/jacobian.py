"""Products, Gram matrices, norms and sketches of a Jacobian that is given as blocks.

A Jacobian ``J (N, K, P)`` is a sequence of blocks side by side: :class:`Factors` of a layer,
:class:`Lookup` of an embedding, :class:`Added` of a parameter that is both, or :class:`Rows`. No
function but :func:`dense` forms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jacpot._backend import threads
from jacpot.ops.arrays import as_kind, as_tensor
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

SketchKind: TypeAlias = Literal["rademacher", "sparse"]

SPARSE_ENTRIES = 8  # of a row of a sparse random matrix
PANEL_ELEMENTS = 1 << 22  # of a random matrix that are held at once, about


def _like(result: Tensor, blocks: Sequence[Block]) -> Any:
    """Give the result as the kind of array that the blocks were given as."""
    return as_kind(result, blocks[0].kind)


def _columns(vector: Any, size: int, dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """Give a block's right-hand sides as ``(P_block, R)``."""
    tensor = as_tensor(name, vector)
    if tensor.dtype != dtype:
        raise TypeError(f"argument {name!r} must be {dtype} like the blocks, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(
            f"argument {name!r} must be on {device} like the blocks, got {tensor.device}"
        )
    if tensor.ndim not in (1, 2) or tensor.shape[0] != size:
        raise ValueError(
            f"argument {name!r} must have shape ({size},) or ({size}, R), got {tuple(tensor.shape)}"
        )
    return tensor.detach().reshape(size, 1 if tensor.ndim == 1 else tensor.shape[1])


def _add_jvp(
    block: Factors | Lookup | Added, vectors: Tensor, out: Tensor, keep: bool = True
) -> None:
    """``out (N, K, R) += J · vectors (R, P)ᵀ``."""
    if isinstance(block, Added):
        for part in block.parts:
            _add_jvp(part, vectors, out, keep)
        return
    if isinstance(block, Lookup):
        out += block.jvp(vectors)
        return
    if keep and block.live is not None:
        block.live.jvp(vectors, out, threads())
        return
    kernels(out).jacobian_jvp(
        block.operands, *block.layout, block.bias, False, vectors, out, threads()
    )


def _vjp(block: Block, u: Tensor, out: Tensor, keep: bool) -> None:
    """``out (R, P) = uᵀ J`` for contiguous ``u (N, K, R)``."""
    if isinstance(block, Rows):
        torch.mm(u.flatten(0, 1).T, block.rows.flatten(0, 1), out=out)
    elif isinstance(block, Lookup):
        out.copy_(block.vjp(u))
    elif isinstance(block, Added):
        _vjp(block.parts[0], u, out, keep)
        for part in block.parts[1:]:
            more = torch.empty_like(out)
            _vjp(part, u, more, keep)
            out += more
    elif keep and block.live is not None:
        block.live.vjp(u, out, threads())
    else:
        kernels(out).jacobian_vjp(
            block.operands, *block.layout, block.bias, False, u, out, threads()
        )


def jvp(blocks: Sequence[Block], vectors: Sequence[Any], keep: bool = True) -> Any:
    """Compute ``J v``, for one or for ``R`` vectors at once.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.
    vectors
        One array per block, ``(P_block,)`` or ``(P_block, R)``.
    keep
        Whether the blocks keep what makes their next products faster, `Factors.live`.

    Returns
    -------
    array
        ``(N, K)`` or ``(N, K, R)``.

    Raises
    ------
    TypeError, ValueError
        If a vector's dtype or shape does not fit its block.

    Examples
    --------
    >>> import torch
    >>> block = Rows(torch.eye(3).reshape(3, 1, 3))
    >>> jvp([block], [torch.tensor([1.0, 2.0, 3.0])])
    tensor([[1.],
            [2.],
            [3.]])
    """
    n, k, dtype = check_blocks(blocks)
    if len(vectors) != len(blocks):
        raise ValueError(
            f"argument 'vectors' must hold one array per block, {len(blocks)}, got {len(vectors)}"
        )
    columns = [
        _columns(v, b.n_parameters, dtype, b.device, f"vectors[{i}]")
        for i, (b, v) in enumerate(zip(blocks, vectors, strict=True))
    ]
    if len({c.shape[1] for c in columns}) != 1 or len({v.ndim for v in vectors}) != 1:
        raise ValueError(
            "argument 'vectors' must all be one column or all have the same number of columns, got "
            f"shapes {[tuple(v.shape) for v in vectors]}"
        )
    r = columns[0].shape[1]
    out = torch.zeros(n, k, r, dtype=dtype, device=blocks[0].device)
    for block, column in zip(blocks, columns, strict=True):
        if isinstance(block, Rows):
            out += block.rows @ column
        else:
            _add_jvp(block, column.T.contiguous(), out, keep)
    return _like(out if vectors[0].ndim == 2 else out[:, :, 0], blocks)


def vjp(blocks: Sequence[Block], u: Any) -> list[Any]:
    """Compute ``Jᵀ u``, for one or for ``R`` vectors at once.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.
    u
        ``(N, K)`` or ``(N, K, R)``.

    Returns
    -------
    list of array
        For each block ``(P_block,)`` or ``(P_block, R)``.

    Raises
    ------
    TypeError, ValueError
        If the dtype or shape of ``u`` does not fit.

    Examples
    --------
    >>> import torch
    >>> vjp([Rows(torch.eye(3).reshape(3, 1, 3))], torch.tensor([[1.0], [2.0], [3.0]]))
    [tensor([1., 2., 3.])]
    """
    parts = torch.split(joined_vjp(blocks, u), [block.n_parameters for block in blocks])
    return [_like(part, blocks) for part in parts]


def joined_vjp(blocks: Sequence[Block], u: Any, keep: bool = True) -> Tensor:
    """Compute what :func:`vjp` does, one block's after the other, ``(P,)`` or ``(P, R)``.

    ``keep`` as in :func:`jvp`.
    """
    n, k, dtype = check_blocks(blocks)
    tensor = as_tensor("u", u)
    if tensor.dtype != dtype:
        raise TypeError(f"argument 'u' must be {dtype} like the blocks, got {tensor.dtype}")
    if tensor.device != blocks[0].device:
        raise ValueError(
            f"argument 'u' must be on {blocks[0].device} like the blocks, got {tensor.device}"
        )
    if tensor.ndim not in (2, 3) or tensor.shape[:2] != (n, k):
        raise ValueError(
            f"argument 'u' must have shape ({n}, {k}) or ({n}, {k}, R), got {tuple(tensor.shape)}"
        )
    columns = tensor.detach().reshape(n, k, 1 if tensor.ndim == 2 else tensor.shape[2])
    columns = columns.contiguous()
    r, sizes = columns.shape[2], [block.n_parameters for block in blocks]
    joined = columns.new_empty(sum(sizes), r)
    for block, own in zip(blocks, torch.split(joined, sizes), strict=True):
        if r == 1:
            _vjp(block, columns, own.T, keep)
        else:
            out = own.new_empty(r, block.n_parameters)
            _vjp(block, columns, out, keep)
            own.copy_(out.T)
    return joined if tensor.ndim == 3 else joined[:, 0]


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
    n, k, dtype = check_blocks(blocks)
    out = torch.empty(
        n, k, sum(b.n_parameters for b in blocks), dtype=dtype, device=blocks[0].device
    )
    start = 0
    for block in blocks:
        weights = _write_rows(block, out, start)
        for panel in row_panels(block, weights=not weights):
            first = start + weights
            out[:, :, first : first + panel.shape[2]] = panel
            start += panel.shape[2]
        start += weights
    return _like(out, blocks)


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
    return _like(total[:, :, 0].sqrt(), blocks)


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
    return _like(torch.cat(parts), blocks)


def sketch(
    blocks: Sequence[Block],
    dim: int,
    seed: int = 0,
    offsets: Sequence[int] | None = None,
    kind: SketchKind = "rademacher",
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

    Returns
    -------
    array
        ``(N, K, dim)``.

    Raises
    ------
    ValueError
        If ``dim`` is not positive, ``offsets`` does not name every block, or ``kind`` is unknown.

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
        ends = torch.tensor([b.n_parameters for b in blocks]).cumsum(0).tolist()
        offsets = [0, *ends[:-1]]
    if len(offsets) != len(blocks):
        raise ValueError(
            f"argument 'offsets' must hold one number per block, {len(blocks)}, got {len(offsets)}"
        )
    out = torch.zeros(n, k, dim, dtype=dtype, device=blocks[0].device)
    key = (seed + 2**63) % 2**64 - 2**63
    if kind == "sparse":
        nonzeros = min(SPARSE_ENTRIES, dim)
        rows = out.view(n * k, dim)
        for block, offset in zip(blocks, offsets, strict=True):
            for panel in row_panels(block):
                part = panel.flatten(0, 1).contiguous()
                kernels(rows).jacobian_sparse_sketch(part, key, offset, nonzeros, rows, threads())
                offset += panel.shape[2]
        return _like(out.mul_(nonzeros**-0.5), blocks)
    for block, offset in zip(blocks, offsets, strict=True):
        p = block.n_parameters
        width = max(1, PANEL_ELEMENTS // max(1, p))
        for start in range(0, dim, width):
            signs = torch.empty(min(width, dim - start), p, dtype=dtype, device=blocks[0].device)
            kernels(signs).jacobian_signs(key, offset, start, signs, threads())
            if isinstance(block, Rows):
                part = block.rows @ signs.T
            else:
                part = torch.zeros(n, k, len(signs), dtype=dtype, device=block.device)
                _add_jvp(block, signs, part)
            out[:, :, start : start + width] += part
    return _like(out.mul_(dim**-0.5), blocks)
