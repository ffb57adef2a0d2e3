"""Powers of two near the sizes of vectors: to multiply by them is exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["power_of_two", "power_of_two_above"]


def power_of_two_above(size: float) -> float:
    """Give a power of two above a size, far from the ends of float64's range; 1 for zero."""
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(size)[1]))) if size > 0 else 1.0


def power_of_two(columns: Tensor) -> Tensor:
    """Give for each column a power of two above its largest element; 1 where all are zero.

    As :func:`power_of_two_above`, without waiting for a GPU.
    """
    if columns.shape[0] == 0:
        return torch.ones(columns.shape[1], dtype=torch.float64, device=columns.device)
    sizes = columns.abs().amax(dim=0).double()
    exponents = torch.where(sizes.isfinite(), torch.frexp(sizes).exponent, 0).clamp(-1000, 1000)
    return (exponents.long() + 1023 << 52).view(torch.float64)  # the bits of 2 to that power
