"""Linear operators: matrices that are known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from jacpot._backend import core, threads

__all__ = ["DenseOperator", "FunctionOperator", "LinearOperator", "as_operator"]

_FLOATS = (torch.float32, torch.float64)


class LinearOperator:
    """A matrix of shape ``(rows, columns)`` that is known by its products.

    A subclass sets ``shape`` and ``dtype`` and implements ``_matmat``, and ``_adjoint`` where
    the transpose is known; everything else follows. ``_double``, ``_dense``, ``_columns``
    and ``_diagonal`` may be given where there is a better way than the general one.

    Attributes
    ----------
    shape : tuple[int, int]
    dtype : torch.dtype
        The dtype its products are computed in, float32 or float64.
    column_group : int
        Columns come cheaper in aligned groups of this many.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    column_group: int = 1

    def _matmat(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (columns, R) of this operator's dtype; returns (rows, R)."""
        raise NotImplementedError

    def _adjoint(self) -> LinearOperator:
        raise NotImplementedError(f"{type(self).__name__} does not know its transpose")

    def _double(self) -> LinearOperator:
        return self

    def _dense(self) -> Tensor:
        return self._matmat(torch.eye(self.shape[1], dtype=self.dtype))

    def _columns(self, indices: Tensor) -> Tensor:
        units = torch.zeros(self.shape[1], len(indices), dtype=self.dtype)
        units[indices, torch.arange(len(indices))] = 1
        return self._matmat(units)

    def _diagonal(self) -> Tensor:
        n, step = self.shape[1], 256
        parts = [
            self._columns(torch.arange(i, min(i + step, n)))[i : i + step].diagonal()
            for i in range(0, n, step)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype)

    def _core(self) -> Any:
        """Give what the compiled solvers call for a product."""
        full = self.double()
        return core.CallbackOperator(
            *self.shape,
            lambda x, out, exact: _into(full if exact else self, x, out),
            lambda x, out, exact: _into(full.T if exact else self.T, x, out),
            torch.finfo(self.dtype).eps / 2,
            torch.finfo(full.dtype).eps / 2,
        )

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self._adjoint()

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (columns,) or (columns, R)."""
        if not isinstance(x, Tensor) or x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"argument 'x' must be a tensor of shape ({self.shape[1]},) or "
                f"({self.shape[1]}, R), got {got}"
            )
        x = x.to(self.dtype)
        return self._matmat(x[:, None])[:, 0] if x.ndim == 1 else self._matmat(x)

    def dense(self) -> Tensor:
        """Write the matrix out, (rows, columns)."""
        return self._dense()

    def columns(self, indices: Tensor) -> Tensor:
        """Write out the columns at ``indices``, (rows, len(indices))."""
        return self._columns(indices)

    def diagonal(self) -> Tensor:
        """Compute the diagonal of a square operator, (n,)."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"a diagonal needs a square operator, got shape {self.shape}")
        return self._diagonal()

    def double(self) -> LinearOperator:
        """Return the same matrix with products in float64, where that can be had; else self."""
        return self._double()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


def _into(operator: LinearOperator, x: Any, out: Any) -> None:
    product = operator._matmat(torch.from_numpy(x).to(operator.dtype))
    if tuple(product.shape) != out.shape:
        raise ValueError(
            f"the operator's product must have shape {out.shape}, got {tuple(product.shape)}"
        )
    torch.from_numpy(out).copy_(product.detach())


class DenseOperator(LinearOperator):
    """A dense float32 or float64 matrix in memory.

    Parameters
    ----------
    matrix
        (rows, columns), a CPU tensor or a NumPy array; not copied when rows are contiguous.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import DenseOperator
    >>> DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]])) @ torch.ones(2)
    tensor([2., 3.])
    """

    symmetric = False  # set by the methods that take it for granted

    def __init__(self, matrix: Any) -> None:
        tensor = _as_tensor(matrix, "operator")
        if tensor.ndim != 2:
            raise ValueError(
                f"argument 'operator' must have 2 dimensions, got shape {tuple(tensor.shape)}"
            )
        self.matrix = tensor if tensor.stride(1) == 1 else tensor.contiguous()
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.dtype = tensor.dtype

    def _matmat(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def _adjoint(self) -> LinearOperator:
        return DenseOperator(self.matrix.T)

    def _double(self) -> LinearOperator:
        return DenseOperator(self.matrix.double())

    def _columns(self, indices: Tensor) -> Tensor:
        return self.matrix[:, indices]

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def _core(self) -> Any:
        return core.DenseOperator(self.matrix.numpy(), self.symmetric, threads())

    def _dense(self) -> Tensor:
        return self.matrix


class FunctionOperator(LinearOperator):
    """An operator from functions on tensors.

    Parameters
    ----------
    shape
        (rows, columns).
    matmat
        Takes (columns, R) and returns (rows, R), both of ``dtype``.
    rmatmat
        The same for the transpose; None for a symmetric operator.
    dtype
        float32 or float64.
    double
        Makes the same operator with products in float64; None when there is no better one.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        matmat: Callable[[Tensor], Tensor],
        rmatmat: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        double: Callable[[], LinearOperator] | None = None,
    ) -> None:
        if dtype not in _FLOATS:
            raise TypeError(f"argument 'dtype' must be torch.float32 or torch.float64, got {dtype}")
        if rmatmat is None and shape[0] != shape[1]:
            raise ValueError(f"argument 'rmatmat' is needed when shape is not square, got {shape}")
        self.shape, self.dtype = shape, dtype
        self._forward, self._backward, self._make_double = matmat, rmatmat, double

    def _matmat(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _adjoint(self) -> LinearOperator:
        if self._backward is None:
            return self
        make = self._make_double
        return FunctionOperator(
            (self.shape[1], self.shape[0]),
            self._backward,
            self._forward,
            self.dtype,
            None if make is None else lambda: make().T,
        )

    def _double(self) -> LinearOperator:
        return self if self._make_double is None else self._make_double()


def as_operator(operator: Any, rhs: Any) -> LinearOperator:
    """Read the matrix argument of :func:`jacpot.solve`.

    Parameters
    ----------
    operator
        A `LinearOperator`; a 2-dimensional array; an object with ``shape`` and ``@`` (SciPy sparse
        matrices and operators, ``linear_operator``'s); or a function of a vector, symmetric and of
        the size of ``rhs``, that takes and returns what ``rhs`` is (tensor or NumPy array).
    rhs
        The right-hand side.
    """
    if isinstance(operator, LinearOperator):
        return operator
    if isinstance(operator, (Tensor, numpy.ndarray)):
        return DenseOperator(operator)
    as_numpy = not isinstance(rhs, Tensor)
    dtype = torch.float32 if str(rhs.dtype).endswith("float32") else torch.float64
    shape = getattr(operator, "shape", None)
    if shape is not None and len(shape) == 2 and hasattr(operator, "__matmul__"):
        return _from_object(operator, (int(shape[0]), int(shape[1])), dtype)
    if callable(operator):
        return _from_function(operator, rhs.shape[0], rhs.ndim == 1, as_numpy, dtype)
    raise TypeError(
        "argument 'operator' must be a LinearOperator, a 2-dimensional array, an object with "
        f"'shape' and '@', or a function, got {type(operator).__name__}"
    )


def _from_object(operator: Any, shape: tuple[int, int], dtype: torch.dtype) -> LinearOperator:
    # SciPy's work on NumPy arrays and say so by their dtype; others are taken to be torch's.
    own = getattr(operator, "dtype", dtype)
    of_torch = isinstance(own, torch.dtype)
    working = torch.float32 if str(own).endswith("float32") else torch.float64

    def product(side: Any) -> Callable[[Tensor], Tensor]:
        if of_torch:
            return lambda x: side @ x
        return lambda x: torch.from_numpy(numpy.ascontiguousarray(side @ x.numpy()))

    return FunctionOperator(shape, product(operator), product(operator.T), working)


def _from_function(
    function: Callable[[Any], Any], size: int, flat: bool, as_numpy: bool, dtype: torch.dtype
) -> LinearOperator:
    def matmat(x: Tensor) -> Tensor:
        given: Any = x[:, 0] if flat else x
        product = function(given.numpy() if as_numpy else given)
        out = torch.as_tensor(product)
        return out[:, None] if flat else out

    return FunctionOperator((size, size), matmat, dtype=dtype)


def _as_tensor(array: Any, name: str) -> Tensor:
    """Take a CPU tensor or NumPy array of a float dtype, without a copy where possible."""
    if isinstance(array, numpy.ndarray):
        if array.dtype not in (numpy.float32, numpy.float64):
            raise TypeError(f"argument {name!r} must be float32 or float64, got {array.dtype}")
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array)
    if not isinstance(array, Tensor):
        raise TypeError(
            f"argument {name!r} must be a tensor or a NumPy array, got {type(array).__name__}"
        )
    if array.dtype not in _FLOATS:
        raise TypeError(f"argument {name!r} must be float32 or float64, got {array.dtype}")
    if array.device.type != "cpu":
        raise ValueError(f"argument {name!r} must be on the CPU, got {array.device}")
    return array.detach()


def power_of_two(columns: Tensor) -> Tensor:
    """Give for each column a power of two above its largest element; 1 where all are zero."""
    if columns.shape[0] == 0:
        return torch.ones(columns.shape[1], dtype=torch.float64)
    largest = columns.abs().amax(dim=0)
    exponent = torch.frexp(largest).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-1000, 1000))
    return torch.where(largest > 0, scale, 1.0)
