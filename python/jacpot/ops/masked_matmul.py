"""Products with a sparse masked weight: time falls with the kept entries, in training too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacpot.ops import masked_matmul_operators as operators
from jacpot.ops.arrays import as_kind, as_tensor, kind_of
from jacpot.ops.masked_matmul_operators import multiply
from jacpot.ops.pattern import Pattern

__all__ = [
    "check_dtypes",
    "compress",
    "dense_is_faster",
    "expand",
    "expand_block",
    "masked_matmul",
    "product",
]


def compress(weight: Tensor, pattern: Pattern) -> Tensor:
    """Gather the kept entries of ``weight (out, in)``: see :meth:`Pattern.compress`."""
    return operators.compress(weight, pattern.block, pattern.nnz)


def expand(values: Tensor, pattern: Pattern) -> Tensor:
    """Put ``values (nnz,)`` in place: see :meth:`Pattern.expand`."""
    return expand_block(values, pattern.block, pattern.shape)


def masked_matmul(
    x: Any,
    values: Any,
    pattern: Pattern,
    bias: Any = None,
    *,
    relu: bool = False,
    layout: str = "row",
    method: str = "auto",
) -> Any:
    """Multiply activations with a sparse weight: ``x @ W.T + bias``.

    Parameters
    ----------
    x
        ``(..., in)``, float32, float64 or (PyTorch) bfloat16, on a GPU float16 too; 16-bit values
        are summed in float32. NumPy, PyTorch or CuPy; any strides.
    values
        ``(nnz,)``: kept entries of the weight in row order (:meth:`Pattern.compress`), of the
        dtype of x.
    pattern
        Which entries of the weight ``(out, in)`` are kept.
    bias
        ``(out,)`` or None.
    relu
        Apply ``max(·, 0)`` to the result, at no cost.
    layout
        How the result lies in memory: ``"row"``, or ``"feature"`` for strides of ``(1, N)``
        (with leading dimensions flattened to N). A sequence of sparse layers that keeps
        ``"feature"`` between them needs no transposes; values and shapes are the same.
    method
        ``"sparse"``, ``"dense"`` (expand the weight and multiply), or ``"auto"``, which takes the
        one that a measured model expects to be faster.

    Returns
    -------
    Tensor, numpy.ndarray or cupy.ndarray
        ``(..., out)``, of the kind of x. Differentiable with regard to x, values and bias,
        any number of times.

    Raises
    ------
    TypeError
        If dtypes are not those above, or differ, or arrays are of different libraries.
    ValueError
        If shapes or devices do not fit, or the layout is unknown.

    Notes
    -----
    The sparse product leaves pruned weights out, the dense one multiplies with their zeros: where
    x is infinite, the one gives infinity or a number, the other NaN.

    Examples
    --------
    >>> import torch, jacpot
    >>> pattern = jacpot.Pattern(torch.tensor([[True, False, True], [False, False, True]]))
    >>> jacpot.masked_matmul(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(3), pattern)
    tensor([[4., 3.]])
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"argument 'pattern' must be a jacpot.Pattern, got {type(pattern).__name__}"
        )
    kind = kind_of(x)
    y = product(
        as_tensor("x", x),
        as_tensor("values", values, kind),
        pattern.block,
        pattern.shape,
        pattern.nnz,
        None if bias is None else as_tensor("bias", bias, kind),
        relu=relu,
        layout=layout,
        method=method,
    )
    return as_kind(y, kind)


def product(
    x: Tensor,
    values: Tensor,
    block: Tensor,
    shape: tuple[int, int],
    nnz: int,
    bias: Tensor | None,
    *,
    relu: bool = False,
    layout: str = "row",
    method: str = "auto",
) -> Tensor:
    """Do what :func:`masked_matmul` does, with a pattern given by its block, shape and nnz."""
    out_features, in_features = shape
    if layout not in ("row", "feature"):
        raise ValueError(f"argument 'layout' must be 'row' or 'feature', got {layout!r}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"argument 'x' must have shape (..., {in_features}) for a pattern of shape "
            f"{shape}, got {tuple(x.shape)}"
        )
    if values.shape != (nnz,):
        raise ValueError(f"argument 'values' must have shape ({nnz},), got {tuple(values.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"argument 'bias' must have shape ({out_features},), got {tuple(bias.shape)}"
        )
    check_dtypes(x, values, bias)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Sums are taken in float32.
        wide = (
            x.float(),
            values.float(),
            block,
            shape,
            nnz,
            None if bias is None else bias.float(),
        )
        return product(*wide, relu=relu, layout=layout, method=method).to(torch.bfloat16)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), in_features)
    feature_major = layout == "feature"
    if _takes_dense(method, rows, nnz, shape):
        y = _dense_product(rows, expand_block(values, block, shape), bias, relu, feature_major)
    else:
        y = multiply(rows, values, bias, block, out_features, relu, feature_major)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def check_dtypes(x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """Refuse values or a bias of another dtype than x, and x if it is not of real numbers."""
    dtype = str(x.dtype).removeprefix("torch.")
    if not x.is_floating_point():
        raise TypeError(f"argument 'x' must be bfloat16, float32 or float64, got {dtype}")
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"argument {name!r} must be {dtype} like 'x', got {got}")


def _takes_dense(method: str, x: Tensor, nnz: int, shape: tuple[int, int]) -> bool:
    if method == "auto":
        # On other devices the operator itself chooses.
        return x.device.type == "cpu" and dense_is_faster(x.shape[0], shape, nnz)
    if method not in ("sparse", "dense"):
        raise ValueError(f"argument 'method' must be 'auto', 'sparse' or 'dense', got {method!r}")
    return method == "dense"


def dense_is_faster(examples: int, shape: tuple[int, int], nnz: int) -> bool:
    """Whether expanding the weight and a dense product are expected to take less time (CPU).

    Measured: large batches break even at a density of about 0.85; below 16 examples the dense
    product is bound by the memory that expanding writes and reads, and never wins.
    """
    return examples >= 16 and nnz > 0.85 * shape[0] * shape[1]


def _dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, feature_major: bool
) -> Tensor:
    if feature_major:
        y = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())
        return (torch.relu(y) if relu else y).t()
    y = torch.nn.functional.linear(x, weight, bias)
    return torch.relu(y) if relu else y


def expand_block(values: Tensor, block: Tensor, shape: tuple[int, int]) -> Tensor:
    """Do what :func:`expand` does, with a pattern given by its block and shape."""
    return operators.expand(values, block, *shape)
