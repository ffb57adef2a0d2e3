"""The Jacobian as an operator on the factors of the layers, which is never written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacpot.linalg import LinearOperator
from jacpot.ops import jacobian as kernels
from jacpot.ops.jacobian import Block, Outputs, Precision, SketchKind
from jacpot.ops.jacobian_gram import prepared
from jacpot.tangent.assemble import Columns
from jacpot.tangent.operators import JacobianOperator, OrderedOperator
from jacpot.tangent.pieces import Piece, in_common, pieces, same_layout
from jacpot.tangent.preconditioners import Auto

__all__ = ["Jacobian"]


class Jacobian:
    """Derivatives of N examples' K outputs by P parameters, held as the factors of the layers.

    Made by :func:`jacobian`. Products with it are exact, cost one product per layer, and need no
    second pass through the network. Results are plain tensors: nothing here is differentiable.

    Attributes
    ----------
    outputs
        The network's outputs at these examples, ``(N, K)``, detached.
    output_shape
        Shape of one example's outputs as the network gives them, of K elements.
    blocks
        The factored blocks (see `jacpot.ops.jacobian`), in the order of the columns.

    Examples
    --------
    >>> import torch, jacpot
    >>> J = jacpot.jacobian(torch.nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]))
    >>> J
    Jacobian(n_examples=1, n_outputs=1, n_parameters=3, dtype=torch.float32)
    >>> J.unflatten(J.T @ torch.ones(1, 1))
    {'weight': tensor([[3., 4.]]), 'bias': tensor([1.])}
    """

    def __init__(
        self,
        outputs: Tensor,
        blocks: Sequence[Block],
        columns: Columns,
        orders: Sequence[Tensor | None] | None = None,
        output_shape: Sequence[int] | None = None,
    ) -> None:
        self.outputs = outputs
        self.output_shape = torch.Size(outputs.shape[1:] if output_shape is None else output_shape)
        self.blocks = list(blocks)
        self._columns = columns
        self._orders = list(orders) if orders is not None else [None] * len(self.blocks)

    @property
    def n_examples(self) -> int:
        """Examples, N."""
        return self.outputs.shape[0]

    @property
    def n_outputs(self) -> int:
        """Outputs per example, K."""
        return self.outputs.shape[1]

    @property
    def n_parameters(self) -> int:
        """Columns, P: under a mask, the kept parameters."""
        return self._columns.size

    @property
    def shape(self) -> tuple[int, int]:
        """``(N·K, P)``."""
        return self.n_examples * self.n_outputs, self.n_parameters

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the parameters, and so of every result."""
        return self.outputs.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def T(self) -> JacobianTranspose:
        """The transpose, for ``J.T @ u``."""
        return JacobianTranspose(self)

    def __repr__(self) -> str:
        return (
            f"Jacobian(n_examples={self.n_examples}, n_outputs={self.n_outputs}, "
            f"n_parameters={self.n_parameters}, dtype={self.dtype})"
        )

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter name -> ``(P,)``; elements that are not kept are left out.

        Columns are in the order of ``module.named_parameters()``, row by row, those that require
        no gradient left out: without a mask, that of ``torch.nn.utils.parameters_to_vector``.

        Raises
        ------
        ValueError
            If names or shapes differ from the parameters'.
        """
        return self._columns.flatten(tensors)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """``(P,)`` or ``(P, R)`` -> tensors by parameter name, zero where nothing is kept.

        Raises
        ------
        ValueError
            If the vector has another length.
        """
        return self._columns.unflatten(vector)

    def to_blocks(self, vector: Tensor) -> list[Tensor]:
        """``(P,)`` or ``(P, R)`` -> one tensor for each of `blocks`, in the order it keeps."""
        parts = torch.split(vector, [block.n_parameters for block in self.blocks])
        return [
            part if order is None else part[order]
            for part, order in zip(parts, self._orders, strict=True)
        ]

    def from_blocks(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor for each of `blocks` -> ``(P,)`` or ``(P, R)``: the inverse of `to_blocks`."""
        if not parts:
            return self.outputs.new_empty(0)
        return torch.cat(
            [
                part if order is None else part[order.argsort()]
                for part, order in zip(parts, self._orders, strict=True)
            ]
        )

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """``J v`` for v ``(P,)``, ``(P, R)`` or by parameter name -> ``(N, K)`` or ``(N, K, R)``.

        Raises
        ------
        TypeError
            If v has another dtype.
        ValueError
            If it has another shape, or names other parameters.
        """
        vector = self.flatten(v) if isinstance(v, Mapping) else _tensor("v", v)
        self._check("v", vector, (self.n_parameters,))
        if not self.blocks:
            return self.outputs.new_zeros(*self.outputs.shape, *vector.shape[1:])
        result: Tensor = kernels.jvp(self.blocks, self.to_blocks(vector.detach()))
        return result

    def _transposed(self, u: Tensor) -> Tensor:
        if u.ndim == 1 and u.numel() == self.shape[0]:
            u = u.reshape(self.outputs.shape)
        self._check("u", u, tuple(self.outputs.shape))
        if not self.blocks:
            return self.outputs.new_zeros(0, *u.shape[2:])
        joined = kernels.joined_vjp(self.blocks, u.detach())
        if all(order is None for order in self._orders):
            return joined
        sizes = [block.n_parameters for block in self.blocks]
        return self.from_blocks(torch.split(joined, sizes))

    def _check(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        if x.dtype != self.dtype:
            raise TypeError(f"argument {name!r} must be {self.dtype}, got {x.dtype}")
        if x.shape[: len(shape)] != shape or x.ndim not in (len(shape), len(shape) + 1):
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"argument {name!r} must have shape ({sizes}) or ({sizes}, R), got {tuple(x.shape)}"
            )

    def gram(
        self,
        other: Jacobian | None = None,
        outputs: Outputs = "full",
        precision: Precision = "exact",
    ) -> Tensor:
        """Compute the tangent kernel ``J Jᵀ``, or ``J J'ᵀ`` with another's examples.

        Parameters
        ----------
        other
            The Jacobian of the same parameters at M other examples. Where the two are of different
            masks, the parameters that both keep count: the others' columns meet zeros.
        outputs
            ``"full"``: ``(N, K, M, K)``. ``"trace"``: the sum over equal outputs, ``(N, M)``.
            ``"diagonal"``: equal outputs only, ``(N, M, K)``.
        precision
            ``"3xtf32"`` and ``"tf32"`` allow the tensor cores of a GPU, see
            `jacpot.ops.jacobian.gram`.

        Returns
        -------
        Tensor
            The kernel; of J with itself it is symmetric to the last bit.

        Raises
        ------
        TypeError, ValueError
            If the two have parameters of different names or shapes, other outputs or dtypes.

        Notes
        -----
        Jacot, Gabriel & Hongler 2018, "Neural tangent kernel".
        """
        return self.prepared_gram(other, outputs, precision)()

    def prepared_gram(
        self,
        other: Jacobian | None = None,
        outputs: Outputs = "full",
        precision: Precision = "exact",
    ) -> Callable[[], Tensor]:
        """Begin :meth:`gram`; what is given back finishes it, and holds no factors of the CPU's.

        Where memory is short, both Jacobians can be dropped before the kernel is written.
        """
        if other is not None and not isinstance(other, Jacobian):
            raise TypeError(f"argument 'other' must be a Jacobian, got {type(other).__name__}")
        left, right = self.blocks, None if other is None else other.blocks
        if other is not None and not self._matches(other):
            left, right = in_common(self._pieces(), other._pieces())
        left = left or [self._nothing()]
        right = None if right is None or other is None else right or [other._nothing()]
        return prepared(left, right, outputs, precision=precision)

    def _matches(self, other: Jacobian) -> bool:
        """Whether the blocks of another, of the same parameters, match one for one."""
        turned = [[order is not None for order in j._orders] for j in (self, other)]
        return (
            self._columns.same_as(other._columns)
            and turned[0] == turned[1]
            and same_layout(self.blocks, other.blocks)
        )

    def _pieces(self) -> list[Piece]:
        return pieces(self._columns, self.blocks, self._orders)

    def _nothing(self) -> Block:
        """Give a block without columns: what is left when everything is pruned."""
        return kernels.Rows(self.outputs.new_empty(*self.outputs.shape, 0))

    def dense(self) -> Tensor:
        """Write J out, ``(N, K, P)``."""
        if not self.blocks:
            return self.outputs.new_empty(*self.outputs.shape, 0)
        full: Tensor = kernels.dense(self.blocks)
        start = 0
        for block, order in zip(self.blocks, self._orders, strict=True):
            if order is not None:
                part = full[:, :, start : start + block.n_parameters]
                part.copy_(part[:, :, order.argsort()])
            start += block.n_parameters
        return full

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, ``(N, K)``, without writing them out."""
        return kernels.row_norms(self.blocks or [self._nothing()])  # type: ignore[no-any-return]

    def column_norms(self) -> Tensor:
        """Euclidean norms of the columns, ``(P,)``: the root of the diagonal of ``JᵀJ``."""
        if not self.blocks:
            return self.outputs.new_empty(0)
        norms: Tensor = kernels.column_norms(self.blocks)
        return self.from_blocks(torch.split(norms, [block.n_parameters for block in self.blocks]))

    def sketch(self, dim: int, seed: int = 0, kind: SketchKind = "rademacher") -> Tensor:
        """Project the rows by a seeded random matrix, ``(N, K, dim)``.

        Parameters
        ----------
        dim
            How many columns are left.
        seed
            Chooses the matrix, which has a row for each column of J and depends on nothing else:
            neither on the examples nor on how they are batched.
        kind
            ``"rademacher"``: signs over ``√dim``. ``"sparse"``: eight signs over ``√8`` for each
            parameter, whose cost does not grow with ``dim``.

        Returns
        -------
        Tensor
            ``J S`` with ``E[S Sᵀ] = I``.
        """
        blocks, orders = self.blocks or [self._nothing()], self._orders or [None]
        found: Tensor = kernels.sketch(blocks, dim, seed, kind=kind, orders=orders)
        return found

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Give J as a SciPy operator ``(N·K, P)`` on NumPy arrays.

        Examples
        --------
        >>> import numpy, torch, jacpot, scipy.sparse.linalg
        >>> net, x = torch.nn.Linear(2, 1).double(), torch.eye(2).double()
        >>> J = jacpot.jacobian(net, x).to_scipy()
        >>> scipy.sparse.linalg.lsmr(J, numpy.ones(2))[0].round(3)
        array([0.333, 0.333, 0.667])
        """

        def forward(v: NDArray[Any]) -> NDArray[Any]:
            product = self @ torch.as_tensor(v, device="cpu").to(self.dtype)
            return product.reshape(self.shape[0], *v.shape[1:]).numpy()

        def backward(u: NDArray[Any]) -> NDArray[Any]:
            columns = torch.as_tensor(u, device="cpu").to(self.dtype)
            return (self.T @ columns.reshape(*self.outputs.shape, *u.shape[1:])).numpy()

        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=self.outputs.new_empty(0).numpy().dtype,
        )

    def to_operator(self) -> LinearOperator:
        """Give J as the operator ``(N·K, P)`` that `jacpot.solve` takes.

        Examples
        --------
        >>> import torch, jacpot
        >>> net, x = torch.nn.Linear(2, 1).double(), torch.eye(2).double()
        >>> J, b = jacpot.jacobian(net, x), torch.ones(2).double()
        >>> jacpot.solve(J, b).x  # the least norm of all solutions
        tensor([0.3333, 0.3333, 0.6667], dtype=torch.float64)
        """
        plain = JacobianOperator(
            self.blocks, self.n_examples, self.n_outputs, device=self.outputs.device
        )
        operator: LinearOperator = plain
        if not all(order is None for order in self._orders):
            operator = OrderedOperator(plain, self.to_blocks, self.from_blocks)
        operator.square_preconditioner = Auto()
        return operator


class JacobianTranspose:
    """``Jᵀ``: what ``J.T`` gives."""

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, N·K)``."""
        return self.T.shape[1], self.T.shape[0]

    def __matmul__(self, u: Tensor) -> Tensor:
        """``Jᵀ u`` for u ``(N, K)`` or ``(N, K, R)`` -> ``(P,)`` or ``(P, R)``.

        Raises
        ------
        TypeError
            If u has another dtype.
        ValueError
            If it has another shape.
        """
        return self.T._transposed(_tensor("u", u))

    def to_operator(self) -> LinearOperator:
        """Give Jᵀ as the operator ``(P, N·K)`` that `jacpot.solve` takes."""
        return self.T.to_operator().T


def _tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        got = f"{type(x).__module__}.{type(x).__qualname__}"
        raise TypeError(f"argument {name!r} must be a torch.Tensor, got {got}")
    return x
