"""Arrays of other libraries as tensors that share their memory, and results back in kind."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["as_tensor", "like", "mask_of_sparse"]


def _is_cupy(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "cupy"


def as_tensor(array: Any) -> Tensor:
    """Give a NumPy or CuPy array as a tensor on the same memory.

    DLPack orders CuPy's current stream before PyTorch's, without waiting on the host.
    """
    if _is_cupy(array):
        tensor: Tensor = from_dlpack(array)
        return tensor
    return torch.as_tensor(array)


def like(result: Tensor, array: Any) -> Any:
    """Give a result as the kind of array that ``array`` is, on the memory it has."""
    if isinstance(array, Tensor):
        return result
    if _is_cupy(array):
        return sys.modules["cupy"].from_dlpack(result.detach())
    return result.detach().numpy()


def mask_of_sparse(matrix: Any) -> Tensor:
    """Give the boolean mask ``(out, in)`` of the stored entries of a SciPy or CuPy matrix."""
    entries = matrix.tocoo()
    row, column = as_tensor(entries.row).long(), as_tensor(entries.col).long()
    mask = torch.zeros(matrix.shape, dtype=torch.bool, device=row.device)
    mask[row, column] = True
    return mask
