"""The two products with the weight of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (N, I) · weightᵀ (I, O) + bias``."""
    y = torch.einsum("ni,oi->no", x, weight)
    return y if bias is None else y + bias


def backward(signals: Tensor, weight: Tensor) -> Tensor:
    """``signals (N, K, O) · weight (O, I)``."""
    return torch.einsum("nko,oi->nki", signals, weight)
