"""What `jacpot.solve` takes for a matrix, read as a linear operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot.linalg.arguments import FLOATS
from jacpot.linalg.operator import DenseOperator, FunctionOperator, LinearOperator
from jacpot.ops.arrays import as_kind, as_tensor, is_array, is_cupy, like

__all__ = ["as_operator"]


def as_operator(operator: Any, rhs: Any) -> LinearOperator:
    """Read the matrix argument of :func:`jacpot.solve`.

    Parameters
    ----------
    operator
        A `LinearOperator`, or what has a method ``to_operator`` that gives one, like a `Jacobian`;
        a 2-dimensional array; a sparse tensor; an object with ``shape`` and ``@`` (SciPy sparse
        matrices and operators, CuPy's, ``linear_operator``'s); or a function of a vector, symmetric
        and of the size of ``rhs``, that takes and returns what ``rhs`` is (tensor, NumPy or CuPy
        array).
    rhs
        The right-hand side, for its kind, dtype, size and device.

    Returns
    -------
    LinearOperator

    Raises
    ------
    TypeError
        For what is none of these, or is not float32 or float64.
    ValueError
        For an array that does not have 2 dimensions.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import as_operator
    >>> twice = as_operator(lambda v: 2 * v, torch.ones(3))
    >>> twice.shape, twice @ torch.ones(3)
    ((3, 3), tensor([2., 2., 2.]))
    """
    if isinstance(operator, LinearOperator):
        return operator
    if hasattr(operator, "to_operator"):
        read: LinearOperator = operator.to_operator()
        return read
    if isinstance(operator, Tensor) and operator.layout != torch.strided:
        return _from_sparse(operator.detach())
    if is_array(operator):
        return DenseOperator(operator)
    tensor = as_tensor("rhs", rhs)
    dtype = torch.float32 if tensor.dtype == torch.float32 else torch.float64
    shape = getattr(operator, "shape", None)
    if shape is not None and len(shape) == 2 and hasattr(operator, "__matmul__"):
        return _from_object(operator, (int(shape[0]), int(shape[1])), dtype, tensor.device)
    if callable(operator):
        return _from_function(operator, rhs, dtype, tensor.device)
    raise TypeError(
        "argument 'operator' must be a LinearOperator, a 2-dimensional array, an object with "
        f"'shape' and '@', or a function, got {type(operator).__name__}"
    )


def _from_sparse(matrix: Tensor) -> LinearOperator:
    if matrix.ndim != 2:
        raise ValueError(
            f"argument 'operator' must have 2 dimensions, got shape {tuple(matrix.shape)}"
        )
    if matrix.dtype not in FLOATS:
        raise TypeError(f"argument 'operator' must be float32 or float64, got {matrix.dtype}")
    transposed = matrix.transpose(0, 1)
    return FunctionOperator(
        (matrix.shape[0], matrix.shape[1]),
        lambda x: matrix @ x,
        lambda x: transposed @ x,
        matrix.dtype,
        lambda: _from_sparse(matrix.double()),
        matrix.device,
    )


def _from_object(
    operator: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> LinearOperator:
    # SciPy's and CuPy's say that they work on such arrays by their dtype; others are torch's.
    own = getattr(operator, "dtype", dtype)
    working = torch.float32 if str(own).endswith("float32") else torch.float64
    kind: Any = (
        "torch" if isinstance(own, torch.dtype) else "cupy" if is_cupy(operator) else "numpy"
    )

    def product(side: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: as_tensor("operator", side @ as_kind(x, kind)).contiguous()

    where = torch.device("cpu") if kind == "numpy" else device
    return FunctionOperator(shape, product(operator), product(operator.T), working, device=where)


def _from_function(
    function: Callable[[Any], Any], rhs: Any, dtype: torch.dtype, device: torch.device
) -> LinearOperator:
    size, flat = rhs.shape[0], rhs.ndim == 1

    def matmat(x: Tensor) -> Tensor:
        out = as_tensor("operator", function(like(x[:, 0] if flat else x, rhs)))
        return out[:, None] if flat else out

    return FunctionOperator((size, size), matmat, dtype=dtype, device=device)
