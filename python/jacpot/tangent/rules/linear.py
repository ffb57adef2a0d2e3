"""Linear layers, with any positions between the examples and the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Summed, Term, positions

__all__ = ["addmm", "linear", "matmul"]


@register_layer_rule(F.linear)
def linear(
    signals: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[str, Term]:
    """``y = x Wᵀ + b``: δ (M, K, ..., O) and x (M, ..., I) are the factors."""
    delta = signals.reshape(positions(signals, 2, 1)).unsqueeze(3)
    x = input.reshape(positions(input, 1, 1)).unsqueeze(2)
    return {"weight": Outer(x, delta), "bias": Summed(delta)}


def _is_layer(input: Tensor, other: Tensor) -> bool:
    return other.ndim == 2 and input.ndim > 1


@register_layer_rule(
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm,
    parameters=("other",), when=_is_layer,
)  # fmt: skip
def matmul(signals: Tensor, input: Tensor, other: Tensor) -> dict[str, Term]:
    """``y = x W`` with W (I, O)."""
    weight = linear(signals, input, other)["weight"]
    assert isinstance(weight, Outer)
    return {"other": Outer(weight.activations, weight.signals, transposed=True)}


def _adds_one_bias(bias: Tensor, x: Tensor, weight: Tensor) -> bool:
    return bias.shape == weight.shape[1:]


@register_layer_rule(torch.addmm, parameters=("bias", "weight"), when=_adds_one_bias)
def addmm(signals: Tensor, bias: Tensor, x: Tensor, weight: Tensor) -> dict[str, Term]:
    """``y = b + x W``, as some transformers write a linear layer."""
    shares = linear(signals, x, weight)
    return {"bias": shares["bias"], "weight": matmul(signals, x, weight)["other"]}
