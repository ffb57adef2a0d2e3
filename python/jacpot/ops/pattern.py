"""The sparsity pattern of a weight, compiled once from its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacpot import _backend
from jacpot.ops.arrays import as_tensor, is_array, like, mask_of_sparse

__all__ = ["Pattern"]


class Pattern:
    """Which entries of a weight are kept: compiled from a mask, immutable.

    The kept entries are held row by row, and once more by rows and by columns in tiles that suit
    a cache, with indices of 16 bits, in one block of memory: about ten bytes an entry. Values
    that belong to a pattern are a vector ``(nnz,)`` in row order, columns rising within a row.

    Parameters
    ----------
    mask
        ``(out, in)``, boolean: a NumPy, PyTorch or CuPy array. True means kept. Or a sparse
        matrix of SciPy or CuPy, whose stored entries are kept.

    Raises
    ------
    TypeError
        If the mask is no array or not boolean.
    ValueError
        If the mask has not two dimensions.
    OverflowError
        If 2**31 entries or more are kept.

    Examples
    --------
    >>> import torch, jacpot
    >>> pattern = jacpot.Pattern(torch.tensor([[True, False, True], [False, False, True]]))
    >>> pattern
    Pattern(shape=(2, 3), nnz=3, density=0.5)
    >>> pattern.compress(torch.arange(6.0).view(2, 3))
    tensor([0., 2., 5.])
    >>> pattern.expand(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 0., 2.],
            [0., 0., 3.]])
    """

    __slots__ = ("_layout", "block", "nnz", "shape")

    _layout: dict[str, Any]
    block: Tensor
    shape: tuple[int, int]
    nnz: int

    def __init__(self, mask: Any) -> None:
        if hasattr(mask, "tocoo"):
            mask = mask_of_sparse(mask)
        device, host = torch.device("cpu"), mask
        if is_array(mask):
            tensor = as_tensor("mask", mask)
            if tensor.is_meta:
                raise ValueError(
                    "argument 'mask' must hold values, got a tensor on the meta device"
                )
            device, host = tensor.device, tensor.detach().cpu()
        block = _backend.core.compile_pattern(host, _allocate, _backend.threads())
        self._open(block, device)

    def _open(self, block: Tensor, device: torch.device) -> None:
        layout = _backend.core.describe_pattern(block)
        object.__setattr__(self, "_layout", layout)
        object.__setattr__(self, "shape", layout["shape"])
        object.__setattr__(self, "nnz", layout["nnz"])
        object.__setattr__(self, "block", block.to(device))

    @classmethod
    def from_block(cls, block: Tensor) -> Pattern:
        """Open a compiled pattern that was stored: the ``block`` of another one."""
        pattern = cls.__new__(cls)
        pattern._open(block.cpu(), block.device)
        return pattern

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Pattern is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Pattern is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Pattern.from_block, (self.block,))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return self is other or (
            self.device == other.device and torch.equal(self.block, other.block)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz))

    def __repr__(self) -> str:
        return f"Pattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.3g})"

    @property
    def density(self) -> float:
        """Kept share of the entries, 0 for an empty weight."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 0.0

    @property
    def device(self) -> torch.device:
        """Where the pattern lies."""
        return self.block.device

    def to(self, device: torch.device | str) -> Pattern:
        """Return the same pattern on another device; itself if it is there already."""
        target = torch.empty(0, device=device).device
        return self if target == self.device else Pattern.from_block(self.block.to(target))

    def _section(self, name: str, count: int, element_bytes: int) -> Tensor:
        start = self._layout[name]
        dtype = torch.uint16 if element_bytes == 2 else torch.int32
        return self.block[start : start + count * element_bytes].view(dtype)

    @property
    def row_offsets(self) -> Tensor:
        """``(out + 1,)`` int32: row r has entries ``row_offsets[r]`` to ``row_offsets[r + 1]``."""
        return self._section("row_offsets", self.shape[0] + 1, 4)

    @property
    def column_indices(self) -> Tensor:
        """``(nnz,)`` uint16 or int32: the column of each entry, in row order."""
        return self._section("column_indices", self.nnz, self._layout["column_index_bytes"])

    @property
    def column_offsets(self) -> Tensor:
        """``(in + 1,)`` int32: where each column begins in column order."""
        return self._section("column_offsets", self.shape[1] + 1, 4)

    @property
    def permutation(self) -> Tensor:
        """``(nnz,)`` int64: for each entry in column order, its place in row order."""
        return torch.argsort(self.column_indices.to(torch.int32), stable=True)

    @property
    def row_indices(self) -> Tensor:
        """``(nnz,)`` int32: the row of each entry, in column order."""
        rows = torch.arange(self.shape[0], dtype=torch.int32, device=self.device)
        counts = self.row_offsets.diff().to(torch.int64)
        return torch.repeat_interleave(rows, counts, output_size=self.nnz)[self.permutation]

    def mask(self) -> Tensor:
        """Return the boolean mask ``(out, in)`` that the pattern was compiled from."""
        ones = torch.ones(self.nnz, dtype=torch.float32, device=self.device)
        mask: Tensor = self.expand(ones).to(torch.bool)
        return mask

    def compress(self, weight: Any) -> Any:
        """Gather the kept entries of a weight; differentiable.

        Parameters
        ----------
        weight
            ``(out, in)``, bfloat16, float32 or float64; NumPy, PyTorch or CuPy.

        Returns
        -------
        Tensor, numpy.ndarray or cupy.ndarray
            ``(nnz,)``, in row order, of the kind of the weight.
        """
        from jacpot.ops.masked_matmul import compress

        return like(compress(as_tensor("weight", weight), self), weight)

    def expand(self, values: Any) -> Any:
        """Put values in place, with zeros where nothing is kept; differentiable.

        Parameters
        ----------
        values
            ``(nnz,)``, in row order; bfloat16, float32 or float64; NumPy, PyTorch or CuPy.

        Returns
        -------
        Tensor, numpy.ndarray or cupy.ndarray
            ``(out, in)``, of the kind of the values.
        """
        from jacpot.ops.masked_matmul import expand

        return like(expand(as_tensor("values", values), self), values)


def _allocate(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")
