"""The Gram matrix of a Jacobian that is given as blocks: the tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jacpot import _backend
from jacpot._backend import threads
from jacpot.ops import jacobian_cuda
from jacpot.ops.arrays import as_kind, as_output
from jacpot.ops.jacobian_blocks import (
    PANEL_BYTES,
    Block,
    Factors,
    Lookup,
    Rows,
    check_blocks,
    row_panels,
)
from jacpot.ops.jacobian_kernels import kernels

__all__ = [
    "Outputs",
    "Precision",
    "Rows",
    "check_precision",
    "gram",
    "pairwise_is_cheaper",
    "prepared",
]

Outputs: TypeAlias = Literal["full", "trace", "diagonal"]
Precision: TypeAlias = Literal["exact", "3xtf32", "tf32"]


def check_precision(precision: str) -> None:
    """Refuse what is no `Precision`."""
    if precision not in ("exact", "3xtf32", "tf32"):
        raise ValueError(
            f"argument 'precision' must be 'exact', '3xtf32' or 'tf32', got {precision!r}"
        )


def gram(
    left: Sequence[Block],
    right: Sequence[Block] | None = None,
    outputs: Outputs = "full",
    out: Any | None = None,
    precision: Precision = "exact",
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
    precision
        How inexact products of float32 factors may be on a GPU, where tensor cores are faster.
        ``"exact"``: float32 itself. ``"3xtf32"``: of numbers split into two TF32 numbers each.
        ``"tf32"``: of numbers rounded to TF32. Everything else is exact at any precision: float64,
        the CPU, and factors under a mask. Rows, where they cost less than factors, know ``"exact"``
        and ``"tf32"`` only; ``"3xtf32"`` is exact for them.

    Returns
    -------
    array
        The kernel, or ``out``.

    Raises
    ------
    TypeError, ValueError
        If the two do not have the same parameters, ``outputs`` or ``precision`` is unknown, or
        ``out`` does not fit.

    Notes
    -----
    On the CPU, where a full kernel's layer has several outputs, units whose signals are zero for
    all outputs of an example, as behind a ReLU that is off, cost nothing. Zeros still make nan of
    what is not finite.

    Where every layer has one position, rounding to TF32 changes an entry ``Θ[n,k,m,l]`` by at most
    2⁻⁹ (2e-3) of ``√(Θ[n,k,n,k] Θ[m,l,m,l])``, and splitting by at most 2⁻¹⁹ (2e-6) of it. With
    several positions, that of a layer counts as ``Σ_t ‖a_t‖ ‖δ_t‖`` in place of its row's norm, and
    where its rows are generated from rounded factors and rounded again, once and a half.
    Sums are in float32 and cut off, not rounded, after every eight products: a relative 2⁻²³ each.

    Examples
    --------
    >>> import torch
    >>> J = [Rows(torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))]
    >>> gram(J, outputs="trace")
    tensor([[25.,  3.],
            [ 3.,  1.]])
    """
    return prepared(left, right, outputs, out, precision)()


def prepared(
    left: Sequence[Block],
    right: Sequence[Block] | None = None,
    outputs: Outputs = "full",
    out: Any | None = None,
    precision: Precision = "exact",
) -> Callable[[], Any]:
    """Begin a Gram matrix; what is given back finishes it, once.

    Factors on the CPU are packed here, and not held by what is given back: a caller that drops them
    before the result is written saves their memory.

    Parameters
    ----------
    left, right, outputs, out, precision
        As in :func:`gram`, which is this and the call of what it gives back.

    Returns
    -------
    callable
        Gives the result of :func:`gram`.

    Examples
    --------
    >>> import torch
    >>> finish = prepared([Rows(torch.tensor([[[3.0, 4.0]]]))], outputs="trace")
    >>> finish()
    tensor([[25.]])
    """
    check_precision(precision)
    n, k, dtype = check_blocks(left, "left")
    symmetric = right is None
    others = left if right is None else right
    m, k_right, dtype_right = check_blocks(others, "right")
    if outputs not in ("full", "trace", "diagonal"):
        raise ValueError(
            f"argument 'outputs' must be 'full', 'trace' or 'diagonal', got {outputs!r}"
        )
    if dtype_right != dtype:
        raise TypeError(f"argument 'right' must be {dtype} like 'left', got {dtype_right}")
    if left[0].device != others[0].device:
        raise ValueError(
            f"argument 'right' must be on {left[0].device} like 'left', got {others[0].device}"
        )
    if k_right != k:
        raise ValueError(f"argument 'right' must have {k} outputs like 'left', got {k_right}")
    sizes = [b.n_parameters for b in left], [b.n_parameters for b in others]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"argument 'right' must have blocks of {sizes[0]} parameters like 'left', "
            f"got {sizes[1]}"
        )
    for a, b in zip(left, others, strict=True):
        if isinstance(a, Factors) and isinstance(b, Factors) and not _same_weights(a, b):
            raise ValueError("argument 'right' must hold the same weights as 'left', got others")
    shape = {"full": (n, k, m, k), "trace": (n, m), "diagonal": (n, m, k)}[outputs]
    if out is None:
        result = _backend.empty(shape, left[0])
    else:
        result = as_output("out", out)
        if result.dtype != dtype:
            raise TypeError(f"argument 'out' must be {dtype}, got {result.dtype}")
        if result.device != left[0].device:
            raise ValueError(
                f"argument 'out' must be on {left[0].device} like 'left', got {result.device}"
            )
        if tuple(result.shape) != shape or not result.is_contiguous():
            raise ValueError(
                f"argument 'out' must be contiguous of shape {shape}, got {tuple(result.shape)}"
            )
    fused, generated = [], []
    for a, b in zip(left, others, strict=True):
        if not (isinstance(a, Factors) and isinstance(b, Factors)):
            generated.append((a, b))
        elif 0 in (*a.signals.shape, *b.signals.shape):  # adds nothing
            continue
        elif pairwise_is_cheaper(a, b, outputs, symmetric):
            pair = b.strided if not symmetric else None
            fused.append((a.strided, pair, *a.layout, a.bias))
        else:
            generated.append((a, b))
    run: Callable[[], object] = result.zero_
    if fused and _backend.on_cuda(result):
        run = partial(jacobian_cuda.jacobian_gram, fused, outputs, result, threads(), precision)
    elif fused:
        run = _backend.core.JacobianGram(fused, outputs, result, threads()).run
    kind = left[0].kind if out is None else None
    plain = jacobian_cuda.matmul_precision if _backend.on_cuda(result) else nullcontext

    def finish() -> Any:
        run()
        with plain(precision):
            for a, b in generated:
                _add_rows(result, a, b, outputs, symmetric)
        if symmetric and generated:  # BLAS need not round the two triangles alike
            if outputs == "diagonal":
                upper = result.permute(2, 0, 1).triu()
                result.copy_((upper + upper.triu(1).transpose(1, 2)).permute(1, 2, 0))
            else:
                rows = n * k if outputs == "full" else n
                kernels(result).jacobian_mirror(result.view(rows, rows), threads())
        return out if kind is None else as_kind(result, kind)

    return finish


def _same_weights(left: Factors, right: Factors) -> bool:
    if left.shape != right.shape:
        return False
    if left.pattern is right.pattern:
        return True
    if left.pattern is None or right.pattern is None:  # one that keeps all is none
        return left.n_weights == right.n_weights
    return torch.equal(left.row_offsets, right.row_offsets) and torch.equal(
        left.column_indices, right.column_indices
    )


def pairwise_is_cheaper(
    left: Factors, right: Factors, outputs: Outputs, symmetric: bool = False
) -> bool:
    """Tell whether pairs of positions cost less than rows that are generated and multiplied.

    Both are counted in multiplications. With one position, pairs always win; with many, the
    ``T²`` pairs stand against the ``K·O·I`` columns of a row.
    """
    n, m, k, t = left.n_examples, right.n_examples, left.n_outputs, left.n_positions
    if t == 1:
        return True
    g, o, i = left.shape
    pairs = n * m / (2 if symmetric else 1)
    outputs_paired = k * k if outputs == "full" else k
    weights = left.n_weights
    of_activations = weights if left.pattern is not None else g * i
    pairwise = pairs * t * t * (of_activations + outputs_paired * g * o)
    generated = (n if symmetric else n + m) * k * t * g * o * i + pairs * outputs_paired * weights
    return pairwise < generated


def _add_rows(result: Tensor, left: Block, right: Block, outputs: Outputs, symmetric: bool) -> None:
    """Add products of generated rows, in panels of columns; if symmetric, above the diagonal."""
    examples = max(left.n_examples, right.n_examples)
    if isinstance(left, Lookup) and isinstance(right, Lookup):  # all others meet zeros
        wanted = left.seen[torch.isin(left.seen, right.seen)]
        panels, others = (b.panels(wanted, PANEL_BYTES, examples) for b in (left, right))
    else:
        panels, others = (row_panels(b, examples=examples) for b in (left, right))
    pairs = ((p, None) for p in panels) if symmetric else zip(panels, others, strict=True)
    for a, b in pairs:
        if outputs == "diagonal":
            other = a if b is None else b
            result += (a.transpose(0, 1) @ other.permute(1, 2, 0)).permute(1, 2, 0)
            continue
        first = 0 if outputs == "full" else 1  # rows (N·K, p), or (N, K·p)
        x = a.flatten(first, first + 1).contiguous()
        y = None if b is None else b.flatten(first, first + 1).contiguous()
        square = result.view(len(x), len(x) if y is None else len(y))
        kernels(result).jacobian_add_row_products(x, y, square, threads())
