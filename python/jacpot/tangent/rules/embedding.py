"""Embeddings: each position looks up an entry of a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import LookedUp, Term

__all__ = ["embedding", "embedding_bag"]


def _counts(tokens: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """Whether each token counts, 1 or 0: the padding token counts as no token, as in torch."""
    if padding_idx is None:
        return torch.ones_like(tokens, dtype=weight.dtype)
    return (tokens != padding_idx % len(weight)).to(weight.dtype)


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
    tokens = input.reshape(m, -1).long()
    delta = signals.reshape(m, k, tokens.shape[1], weight.shape[1])
    if padding_idx is not None:
        delta = delta * _counts(tokens, weight, padding_idx)[:, None, :, None]
    return {"weight": LookedUp(tokens, delta, len(weight))}


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
    counts = _counts(input, weight, padding_idx)
    if mode == "mean":
        counts = counts / counts.sum(1, keepdim=True).clamp_min(1)
    elif per_sample_weights is not None:
        counts = counts * per_sample_weights
    delta = signals[:, :, None] * counts[:, None, :, None]
    return {"weight": LookedUp(input.long(), delta, len(weight))}
