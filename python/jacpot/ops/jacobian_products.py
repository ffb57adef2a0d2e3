"""Products of a Jacobian that is given as blocks, and of its transpose, with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import threads
from jacpot.ops.arrays import as_kind, as_tensor
from jacpot.ops.jacobian_blocks import Added, Block, Lookup, Rows, check_blocks
from jacpot.ops.jacobian_kernels import kernels

__all__ = ["add_jvp", "joined_vjp", "jvp", "vjp"]


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


def add_jvp(block: Block, vectors: Tensor, out: Tensor, keep: bool = True) -> None:
    """``out (N, K, R) += J · vectorsᵀ`` for contiguous ``vectors (R, P)``; ``keep`` as in `jvp`."""
    if isinstance(block, Rows):
        out += block.rows @ vectors.T
    elif isinstance(block, Lookup):
        out += block.jvp(vectors)
    elif isinstance(block, Added):
        for part in block.parts:
            add_jvp(part, vectors, out, keep)
    elif keep and block.live is not None:
        block.live.jvp(vectors, out, threads())
    else:
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
        add_jvp(block, column.T.contiguous(), out, keep)
    return as_kind(out if vectors[0].ndim == 2 else out[:, :, 0], blocks[0].kind)


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
    return [as_kind(part, blocks[0].kind) for part in parts]


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
