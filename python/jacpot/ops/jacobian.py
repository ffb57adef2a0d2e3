"""Products, Gram matrices, norms and sketches of a Jacobian that is given as blocks.

A Jacobian ``J (N, K, P)`` is a sequence of blocks side by side: :class:`Factors` of a layer, or
:class:`Rows`. No function but :func:`dense` forms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jacpot.ops.jacobian_blocks import Block, Factors, Rows, check_blocks, row_panels

__all__ = [
    "Block",
    "Factors",
    "Outputs",
    "Rows",
    "column_norms",
    "dense",
    "gram",
    "jvp",
    "row_norms",
    "sketch",
    "vjp",
]

Outputs: TypeAlias = Literal["full", "trace", "diagonal"]

PANEL_ELEMENTS = 1 << 22  # what is held at once beside factors and result, about


def _like(result: Tensor, blocks: Sequence[Block]) -> Any:
    """Give the result as a NumPy array if the blocks were given as such."""
    return result.numpy() if blocks[0].is_numpy else result


def _columns(vector: Any, size: int, dtype: torch.dtype, name: str) -> Tensor:
    """Give a block's right-hand sides as ``(P_block, R)``."""
    tensor = torch.as_tensor(vector)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the blocks, got {tensor.dtype}")
    if tensor.ndim not in (1, 2) or tensor.shape[0] != size:
        raise ValueError(
            f"{name} must have shape ({size},) or ({size}, R), got {tuple(tensor.shape)}"
        )
    return tensor.detach().reshape(size, 1 if tensor.ndim == 1 else tensor.shape[1])


def _weight(block: Factors, columns: Tensor) -> Tensor:
    """Columns ``(P_block, R)`` of a block as weights ``(R, G, O, I)``, zero where none is kept."""
    g, o, i = block.shape
    kept = columns[: block.n_weights]
    if block.pattern is not None:
        full = columns.new_zeros(g * o * i, columns.shape[1])
        full[block.kept] = kept
        kept = full
    return kept.T.reshape(columns.shape[1], g, o, i)


def jvp(blocks: Sequence[Block], vectors: Sequence[Any]) -> Any:
    """Compute ``J v``, for one or for ``R`` vectors at once.

    Parameters
    ----------
    blocks
        The Jacobian, ``(N, K, P)``.
    vectors
        One array per block, ``(P_block,)`` or ``(P_block, R)``.

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
            f"vectors must hold one array per block, {len(blocks)}, got {len(vectors)}"
        )
    columns = [
        _columns(v, b.n_parameters, dtype, f"vectors[{i}]")
        for i, (b, v) in enumerate(zip(blocks, vectors, strict=True))
    ]
    if len({c.shape[1] for c in columns}) != 1 or len({v.ndim for v in vectors}) != 1:
        raise ValueError("vectors must all be one column or all have the same number of columns")
    r = columns[0].shape[1]
    out = torch.zeros(n, k, r, dtype=dtype)
    for block, column in zip(blocks, columns, strict=True):
        if isinstance(block, Rows):
            out += block.rows @ column
            continue
        g, o, _ = block.shape
        z = torch.einsum("ntgi,rgoi->ntgor", block.activations, _weight(block, column))
        if block.bias:
            z += column[block.n_weights :].reshape(g, o, r)
        out += torch.einsum("nktgo,ntgor->nkr", block.signals, z)
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
    n, k, dtype = check_blocks(blocks)
    tensor = torch.as_tensor(u)
    if tensor.dtype != dtype:
        raise TypeError(f"u must be {dtype} like the blocks, got {tensor.dtype}")
    if tensor.ndim not in (2, 3) or tensor.shape[:2] != (n, k):
        raise ValueError(
            f"u must have shape ({n}, {k}) or ({n}, {k}, R), got {tuple(tensor.shape)}"
        )
    columns = tensor.detach().reshape(n, k, 1 if tensor.ndim == 2 else tensor.shape[2])
    r = columns.shape[2]
    results = []
    for block in blocks:
        if isinstance(block, Rows):
            out = torch.einsum("nkp,nkr->pr", block.rows, columns)
        else:
            out = columns.new_empty(block.n_parameters, r)
            w = torch.einsum("nktgo,nkr->ntgor", block.signals, columns)
            weight = torch.einsum("ntgor,ntgi->goir", w, block.activations).flatten(0, 2)
            out[: block.n_weights] = weight if block.pattern is None else weight[block.kept]
            if block.bias:
                out[block.n_weights :] = w.sum((0, 1)).flatten(0, 1)
        results.append(_like(out if tensor.ndim == 3 else out[:, 0], blocks))
    return results


def dense(blocks: Sequence[Block]) -> Any:
    """Form ``J`` itself, ``(N, K, P)``.

    Examples
    --------
    >>> import torch
    >>> a, s = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> dense([Factors(a.reshape(1, 1, 1, 2), s.reshape(1, 1, 1, 1, 2))])
    tensor([[[3., 6., 4., 8.]]])
    """
    n, k, dtype = check_blocks(blocks)
    out = torch.empty(n, k, sum(b.n_parameters for b in blocks), dtype=dtype)
    start = 0
    for block in blocks:
        for panel in row_panels(block):
            out[:, :, start : start + panel.shape[2]] = panel
            start += panel.shape[2]
    return _like(out, blocks)


def row_norms(blocks: Sequence[Block]) -> Any:
    """Compute the Euclidean norm of every row of ``J``, ``(N, K)``.

    Examples
    --------
    >>> import torch
    >>> row_norms([Rows(torch.tensor([[[3.0, 4.0]]]))])
    tensor([[5.]])
    """
    n, k, dtype = check_blocks(blocks)
    total = torch.zeros(n, k, dtype=torch.float64)
    for block in blocks:
        for panel in row_panels(block):
            total += panel.square().sum(2)
    return _like(total.sqrt().to(dtype), blocks)


def column_norms(blocks: Sequence[Block]) -> Any:
    """Compute the Euclidean norm of every column of ``J``, ``(P,)``.

    Their squares are the diagonal of ``JᵀJ``.

    Examples
    --------
    >>> import torch
    >>> column_norms([Rows(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))])
    tensor([5., 1.])
    """
    _, _, dtype = check_blocks(blocks)
    panels = (panel.square().sum((0, 1)).sqrt() for b in blocks for panel in row_panels(b))
    return _like(torch.cat([torch.empty(0, dtype=dtype), *panels]), blocks)


def gram(
    left: Sequence[Block],
    right: Sequence[Block] | None = None,
    outputs: Outputs = "full",
    out: Any | None = None,
) -> Any:
    """Compute inner products of the rows of two Jacobians: the tangent kernel.

    Parameters
    ----------
    left, right
        Jacobians ``(N, K, P)`` and ``(M, K, P)`` of the same parameters. None: ``left`` with
        itself, and the result is exactly symmetric.
    outputs
        ``"full"``: all pairs of outputs, ``(N, K, M, K)``. ``"trace"``: summed over equal outputs,
        ``(N, M)``. ``"diagonal"``: equal outputs only, ``(N, M, K)``.
    out
        Contiguous array to write the result into.

    Returns
    -------
    array
        The kernel, or ``out``.

    Raises
    ------
    TypeError, ValueError
        If the two do not have the same parameters, ``outputs`` is unknown, or ``out`` does not fit.

    Examples
    --------
    >>> import torch
    >>> J = [Rows(torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))]
    >>> gram(J, outputs="trace")
    tensor([[25.,  3.],
            [ 3.,  1.]])
    """
    n, k, dtype = check_blocks(left, "left")
    symmetric = right is None
    others = left if right is None else right
    m, k_right, dtype_right = check_blocks(others, "right")
    if outputs not in ("full", "trace", "diagonal"):
        raise ValueError(f"outputs must be 'full', 'trace' or 'diagonal', got {outputs!r}")
    if dtype_right != dtype:
        raise TypeError(f"right must be {dtype} like left, got {dtype_right}")
    if k_right != k:
        raise ValueError(f"right must have {k} outputs like left, got {k_right}")
    sizes = [b.n_parameters for b in left], [b.n_parameters for b in others]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"right must have blocks of {sizes[0]} parameters like left, got {sizes[1]}"
        )
    shape = {"full": (n, k, m, k), "trace": (n, m), "diagonal": (n, m, k)}[outputs]
    if out is None:
        result = torch.zeros(shape, dtype=dtype)
    else:
        result = torch.as_tensor(out)
        if result.dtype != dtype:
            raise TypeError(f"out must be {dtype}, got {result.dtype}")
        if tuple(result.shape) != shape or not result.is_contiguous():
            raise ValueError(f"out must be contiguous of shape {shape}, got {tuple(result.shape)}")
        result.zero_()
    for a, b in zip(left, others, strict=True):
        if isinstance(a, Factors) and isinstance(b, Factors) and _factorises(a):
            _add_factored(result, a, b, outputs)
        else:
            _add_rows(result, a, b, outputs)
    if symmetric:  # BLAS need not round the two triangles alike
        square = result.view(n * k, m * k) if outputs == "full" else result
        for i in range(len(square)):
            square[i + 1 :, i] = square[i, i + 1 :]
    return _like(result, left) if out is None else out


def _factorises(block: Factors) -> bool:
    return block.n_positions == 1 and block.pattern is None


def _add_factored(result: Tensor, left: Factors, right: Factors, outputs: Outputs) -> None:
    """Add ``⟨a_n, a_m⟩ ⟨δ_nk, δ_ml⟩``, for a layer with one position, some rows at a time."""
    n, m, k = left.n_examples, right.n_examples, left.n_outputs
    step = max(1, (PANEL_ELEMENTS // max(1, k * m * k)))
    for group in range(left.shape[0]):
        s_right = right.signals[:, :, 0, group]  # (M, K, O)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            a = left.activations[rows, 0, group] @ right.activations[:, 0, group].T
            if left.bias:
                a += 1
            s = left.signals[rows, :, 0, group]
            if outputs == "full":
                product = s.flatten(0, 1) @ s_right.flatten(0, 1).T
                result[rows] += product.view(len(s), k, m, k).mul_(a[:, None, :, None])
            elif outputs == "trace":
                result[rows] += a * (s.flatten(1) @ s_right.flatten(1).T)
            else:
                product = s.transpose(0, 1) @ s_right.permute(1, 2, 0)  # (K, n, M)
                result[rows] += product.permute(1, 2, 0) * a[:, :, None]


def _add_rows(result: Tensor, left: Block, right: Block, outputs: Outputs) -> None:
    """Add the same from generated rows, a panel of columns at a time."""
    n, m, k = left.n_examples, right.n_examples, left.n_outputs
    panels = row_panels(left)
    for a, b in (
        ((p, p) for p in panels) if right is left else zip(panels, row_panels(right), strict=True)
    ):
        if outputs == "full":
            result.view(n * k, m * k).addmm_(a.flatten(0, 1), b.flatten(0, 1).T)
        elif outputs == "trace":
            result.addmm_(a.flatten(1), b.flatten(1).T)
        else:
            result += (a.transpose(0, 1) @ b.permute(1, 2, 0)).permute(1, 2, 0)


def sketch(
    blocks: Sequence[Block], dim: int, seed: int = 0, offsets: Sequence[int] | None = None
) -> Any:
    """Compute ``J S`` for a seeded random ``S (P, dim)`` of signs over ``√dim``.

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

    Returns
    -------
    array
        ``(N, K, dim)``.

    Raises
    ------
    ValueError
        If ``dim`` is not positive or ``offsets`` does not name every block.

    Notes
    -----
    Achlioptas, Database-friendly random projections, 2003.

    Examples
    --------
    >>> import torch
    >>> sketch([Rows(torch.ones(1, 1, 1))], dim=4).abs()
    tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])
    """
    n, k, dtype = check_blocks(blocks)
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if offsets is None:
        ends = torch.tensor([b.n_parameters for b in blocks]).cumsum(0).tolist()
        offsets = [0, *ends[:-1]]
    if len(offsets) != len(blocks):
        raise ValueError(
            f"offsets must hold one number per block, {len(blocks)}, got {len(offsets)}"
        )
    out = torch.zeros(n, k, dim, dtype=dtype)
    for block, offset in zip(blocks, offsets, strict=True):
        width = max(1, PANEL_ELEMENTS // max(1, block.n_parameters))
        for start in range(0, dim, width):
            stop = min(dim, start + width)
            signs = _signs(seed, offset, block.n_parameters, start, stop).to(dtype)
            out[:, :, start:stop] += torch.as_tensor(jvp([block], [signs]))
    return _like(out.mul_(dim**-0.5), blocks)


def _signs(seed: int, offset: int, count: int, start: int, stop: int) -> Tensor:
    """Draw ``±1`` for parameters ``offset + [0, count)`` and columns ``[start, stop)``."""
    p = torch.arange(offset, offset + count, dtype=torch.int64)[:, None]
    d = torch.arange(start, stop, dtype=torch.int64)[None, :]
    z = _mix(_mix(p + _signed(seed)) + d)
    return 1 - 2 * (z & 1)


def _signed(x: int) -> int:
    """Give an integer modulo 2**64 as the int64 of the same bits."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(z: Tensor) -> Tensor:
    """Mix 64 bits (Steele, Lea and Flood, Fast splittable pseudorandom generators, 2014)."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right logically; that of int64 itself is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
