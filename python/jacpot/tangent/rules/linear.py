"""Linear layers, with any positions between the examples and the features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Summed, Term, positions

__all__ = ["linear"]


@register_layer_rule(F.linear)
def linear(
    signals: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[str, Term]:
    """``y = x Wᵀ + b``: δ (M, K, ..., O) and x (M, ..., I) are the factors."""
    delta = signals.reshape(positions(signals, 2, 1)).unsqueeze(3)
    x = input.reshape(positions(input, 1, 1)).unsqueeze(2)
    return {"weight": Outer(x, delta), "bias": Summed(delta)}
