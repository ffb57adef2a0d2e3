"""Arrays of other libraries as tensors that share their memory, and results back in kind."""

from __future__ import annotations

import sys
import warnings
from typing import Any, Literal, TypeAlias

import numpy
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = [
    "Kind",
    "as_kind",
    "as_tensor",
    "expect_kind",
    "is_cupy",
    "kind_of",
    "like",
    "mask_of_sparse",
]

Kind: TypeAlias = Literal["torch", "numpy", "cupy"]


def is_cupy(array: Any) -> bool:
    """Whether something is CuPy's: an array, or a sparse matrix or an operator on such."""
    return type(array).__module__.partition(".")[0] in ("cupy", "cupyx")


def kind_of(array: Any) -> Kind:
    """Whose an array is."""
    if isinstance(array, Tensor):
        return "torch"
    return "cupy" if is_cupy(array) else "numpy"


def expect_kind(name: str, array: Any, kind: Kind) -> None:
    """Refuse what is no array, or another library's than ``kind`` says."""
    if not isinstance(array, Tensor | numpy.ndarray) and not is_cupy(array):
        raise TypeError(
            f"argument {name!r} must be a NumPy, PyTorch or CuPy array, got {type(array).__name__}"
        )
    if kind_of(array) != kind:
        raise TypeError(
            f"argument {name!r} must be of {kind} like the others, got {kind_of(array)}"
        )


def as_tensor(array: Any) -> Tensor:
    """Give a NumPy or CuPy array as a tensor on the same memory.

    DLPack orders CuPy's current stream before PyTorch's, without waiting on the host.
    """
    if is_cupy(array):
        tensor: Tensor = from_dlpack(array)
        return tensor
    if isinstance(array, numpy.ndarray) and any(stride < 0 for stride in array.strides):
        array = array.copy()  # tensors have no negative strides
    with warnings.catch_warnings():
        # Nothing is written to what callers give.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(array)


def like(result: Tensor, array: Any) -> Any:
    """Give a result as the kind of array that ``array`` is, on the memory it has."""
    return as_kind(result, kind_of(array))


def as_kind(result: Tensor, kind: Kind) -> Any:
    """Give a result as a kind of array, on the memory it has."""
    if kind == "torch":
        return result
    if kind == "cupy":
        return sys.modules["cupy"].from_dlpack(result.detach())
    return result.detach().numpy()


def mask_of_sparse(matrix: Any) -> Tensor:
    """Give the boolean mask ``(out, in)`` of the stored entries of a SciPy or CuPy matrix."""
    entries = matrix.tocoo()
    row, column = as_tensor(entries.row).long(), as_tensor(entries.col).long()
    mask = torch.zeros(matrix.shape, dtype=torch.bool, device=row.device)
    mask[row, column] = True
    return mask
