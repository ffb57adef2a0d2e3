"""Linear operators: matrices that are known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacpot._backend import core, threads
from jacpot.linalg.arguments import FLOATS, float_tensor

__all__ = ["DenseOperator", "FunctionOperator", "LinearOperator", "NormalOperator"]


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
    device : torch.device
        Where its products are computed; the CPU unless a subclass says otherwise.
    column_group : int
        Columns come cheaper in aligned groups of this many.
    replayable : bool
        Whether a product is the same work on a GPU each time, and reads nothing on the host: then
        solvers may record it into a CUDA graph.
    least_squares : bool
        Whether it stands for a least-squares problem even if it is square: then `jacpot.solve`
        adds damping to the normal equations.
    square_preconditioner : Preconditioner or None
        What speeds up ``A Aᵀ + damping·I`` or ``Aᵀ A + damping·I``, whichever is smaller, so that
        damped least squares had better go that way.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.linalg import LinearOperator
    >>> class Scaling(LinearOperator):
    ...     shape, dtype = (3, 3), torch.float64
    ...     def _matmat(self, x):
    ...         return 2 * x
    >>> jacpot.solve(Scaling(), torch.ones(3, dtype=torch.float64)).x
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    column_group: int = 1
    replayable: bool = False
    least_squares: bool = False
    square_preconditioner: Any = None

    def _matmat(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (columns, R) of this operator's dtype; returns (rows, R)."""
        raise NotImplementedError

    def _adjoint(self) -> LinearOperator:
        raise NotImplementedError(f"{type(self).__name__} does not know its transpose")

    def _double(self) -> LinearOperator:
        return self

    def _dense(self) -> Tensor:
        return self._matmat(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))

    def _columns(self, indices: Tensor) -> Tensor:
        options: dict[str, Any] = {"device": self.device}
        units = torch.zeros(self.shape[1], len(indices), dtype=self.dtype, **options)
        units[indices, torch.arange(len(indices), **options)] = 1
        return self._matmat(units)

    def _diagonal(self) -> Tensor:
        n, step = self.shape[1], 256
        parts = [
            self._columns(torch.arange(i, min(i + step, n), device=self.device))[
                i : i + step
            ].diagonal()
            for i in range(0, n, step)
        ]
        if not parts:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.cat(parts)

    def _normal(self) -> LinearOperator:
        """Give ``Aᵀ A``, which preconditioners of least-squares problems are made for."""
        return NormalOperator(self)

    def _kernel(self) -> LinearOperator:
        """Give ``A Aᵀ``."""
        return NormalOperator(self.T)

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
        (rows, columns): a tensor, a NumPy or CuPy array; not copied when rows are contiguous.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import DenseOperator
    >>> DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]])) @ torch.ones(2)
    tensor([2., 3.])
    """

    symmetric = False  # set by the methods that take it for granted
    replayable = True

    def __init__(self, matrix: Any) -> None:
        tensor = float_tensor("operator", matrix)
        if tensor.ndim != 2:
            raise ValueError(
                f"argument 'operator' must have 2 dimensions, got shape {tuple(tensor.shape)}"
            )
        self.matrix = tensor if tensor.stride(1) == 1 else tensor.contiguous()
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.dtype, self.device = tensor.dtype, tensor.device

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


class NormalOperator(LinearOperator):
    """``Aᵀ A`` (columns, columns), by products with A.

    Parameters
    ----------
    operator
        A, with a transpose.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import DenseOperator
    >>> from jacpot.linalg.operator import NormalOperator
    >>> NormalOperator(DenseOperator(torch.tensor([[1.0, 2.0]]))).diagonal()
    tensor([1., 4.])
    """

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.transpose = operator, operator.T
        self.shape = (operator.shape[1], operator.shape[1])
        self.dtype, self.device = operator.dtype, operator.device

    def _matmat(self, x: Tensor) -> Tensor:
        return self.transpose._matmat(self.operator._matmat(x))

    def _adjoint(self) -> LinearOperator:
        return self

    def _double(self) -> LinearOperator:
        return NormalOperator(self.operator.double())

    def _columns(self, indices: Tensor) -> Tensor:
        return self.transpose._matmat(self.operator.columns(indices))

    def _diagonal(self) -> Tensor:
        indices = torch.arange(self.shape[1], device=self.device)
        parts = [self.operator.columns(i).square().sum(0) for i in torch.split(indices, 256)]
        return torch.cat(parts)


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
    device
        Of the tensors that the functions take and return.

    Raises
    ------
    TypeError, ValueError
        For another dtype, or a shape that is not square without ``rmatmat``.

    Examples
    --------
    >>> import torch
    >>> from jacpot.linalg import FunctionOperator
    >>> difference = FunctionOperator(
    ...     (2, 3), lambda x: x[1:] - x[:-1],
    ...     lambda u: torch.nn.functional.pad(-u, (0, 0, 0, 1))
    ...     + torch.nn.functional.pad(u, (0, 0, 1, 0)),
    ... )
    >>> difference @ torch.tensor([1.0, 2.0, 4.0])
    tensor([1., 2.], dtype=torch.float64)
    >>> difference.T @ torch.tensor([1.0, 2.0])
    tensor([-1., -1.,  2.], dtype=torch.float64)
    """

    def __init__(
        self,
        shape: tuple[int, int],
        matmat: Callable[[Tensor], Tensor],
        rmatmat: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        double: Callable[[], LinearOperator] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in FLOATS:
            raise TypeError(f"argument 'dtype' must be torch.float32 or torch.float64, got {dtype}")
        if rmatmat is None and shape[0] != shape[1]:
            raise ValueError(f"argument 'rmatmat' is needed when shape is not square, got {shape}")
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
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
            self.device,
        )

    def _double(self) -> LinearOperator:
        return self if self._make_double is None else self._make_double()
