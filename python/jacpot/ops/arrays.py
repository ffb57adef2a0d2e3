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
    "as_output",
    "as_tensor",
    "is_array",
    "is_cupy",
    "kind_of",
    "like",
    "mask_of_sparse",
]

Kind: TypeAlias = Literal["torch", "numpy", "cupy"]


def is_cupy(array: Any) -> bool:
    """Whether something is CuPy's: an array, or a sparse matrix or an operator on such."""
    return type(array).__module__.partition(".")[0] in ("cupy", "cupyx")


def is_array(array: Any) -> bool:
    """Whether something is a dense array of NumPy, PyTorch or CuPy."""
    known = isinstance(array, Tensor | numpy.ndarray)
    return known or (is_cupy(array) and hasattr(array, "__dlpack__"))


def kind_of(array: Any) -> Kind:
    """Whose an array is."""
    if isinstance(array, Tensor):
        return "torch"
    return "cupy" if is_cupy(array) else "numpy"


def as_tensor(name: str, array: Any, kind: Kind | None = None) -> Tensor:
    """Give an array as a tensor on the same memory, to be read.

    DLPack orders CuPy's current stream before PyTorch's, without waiting on the host.

    Raises
    ------
    TypeError
        With the argument's name, if it is no dense array, another library's than ``kind`` says, or
        holds what PyTorch has no numbers for.
    """
    if not is_array(array):
        raise TypeError(
            f"argument {name!r} must be a NumPy, PyTorch or CuPy array, got {type(array).__name__}"
        )
    if kind is not None and kind_of(array) != kind:
        raise TypeError(
            f"argument {name!r} must be of {kind} like the others, got {kind_of(array)}"
        )
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise TypeError(f"argument {name!r} must be a dense tensor, got layout {array.layout}")
        return array.resolve_neg()  # the memory, which kernels read, says nothing of a sign
    if is_cupy(array):
        if any(stride < 0 for stride in array.strides):
            array = array.copy()  # tensors have no negative strides
        tensor: Tensor = from_dlpack(array)
        return tensor
    if isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"argument {name!r} must be a plain array, got a masked one; fill it first")
    if not array.flags.aligned or any(stride < 0 for stride in array.strides):
        array = array.copy()  # kernels load whole elements, and tensors have no negative strides
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError):  # long doubles, objects, another byte order
        raise TypeError(
            f"argument {name!r} must be of a dtype that PyTorch has, in this machine's byte order, "
            f"got {array.dtype}"
        ) from None


def as_output(name: str, array: Any) -> Tensor:
    """Give an array as a tensor on the same memory, to be written to."""
    if isinstance(array, Tensor) and array.is_neg():
        raise ValueError(f"argument {name!r} must hold its numbers as they are, not a negated view")
    flags = array.flags if isinstance(array, numpy.ndarray) else None
    if flags is not None and not (flags.writeable and flags.c_contiguous and flags.aligned):
        raise ValueError(f"argument {name!r} must be writeable, aligned and contiguous in C order")
    return as_tensor(name, array)


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
    row, column = (as_tensor("mask", axis).long() for axis in (entries.row, entries.col))
    mask = torch.zeros(matrix.shape, dtype=torch.bool, device=row.device)
    mask[row, column] = True
    return mask
