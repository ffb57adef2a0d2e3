"""Which kernels take a tensor: those of the CPU, or the ones of the same names for a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jacpot import _backend
from jacpot.ops import jacobian_cuda

__all__ = ["kernels"]


def kernels(tensor: Tensor) -> Any:
    """Give the kernels of the Jacobian for the device that a tensor is on."""
    return jacobian_cuda if _backend.on_cuda(tensor) else _backend.core
