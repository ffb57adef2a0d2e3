"""Embeddings: a linear layer whose activations have a single one, at the token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Term

__all__ = ["embedding", "embedding_bag"]


def _one_hot(tokens: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """``(M, T)`` tokens -> ``(M, T, V)``; the padding token counts as no token, as in torch."""
    hot = F.one_hot(tokens, len(weight)).to(weight.dtype)
    if padding_idx is not None:
        hot[..., padding_idx] = 0
    return hot


@register_layer_rule(F.embedding, parameters=("weight",), integer_input=True)
def embedding(
    signals: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Term]:
    """``y = E[token]``: tokens (M, ...) and δ (M, K, ..., D)."""
    m, k = signals.shape[:2]
    hot = _one_hot(input.reshape(m, -1), weight, padding_idx)
    delta = signals.reshape(m, k, hot.shape[1], 1, -1)
    return {"weight": Outer(hot.unsqueeze(2), delta, transposed=True)}


def _one_bag_a_row(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    *_: object,
    **__: object,
) -> bool:
    return input.ndim == 2 and mode in ("sum", "mean")


@register_layer_rule(
    F.embedding_bag, parameters=("weight",), integer_input=True, when=_one_bag_a_row
)
def embedding_bag(
    signals: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> dict[str, Term]:
    """Sums or means of the rows of a bag, tokens (M, L), δ (M, K, D)."""
    hot = _one_hot(input, weight, padding_idx)
    if per_sample_weights is not None:
        hot = hot * per_sample_weights.unsqueeze(2)
    counts = hot.sum(1)
    if mode == "mean":
        counts = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return {"weight": Outer(counts[:, None, None], signals[:, :, None, None], transposed=True)}
