"""Normalisations with a scale and a shift, which see the normalised input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Rows, Term

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def _per_channel(signals: Tensor, normal: Tensor) -> dict[str, Term]:
    """``y = w x + b`` per channel: δ (M, K, C, ...) and x (M, C, ...), summed over the rest."""
    m, k, c = signals.shape[:3]
    delta, x = signals.reshape(m, k, c, -1), normal.reshape(m, 1, c, -1)
    return {"weight": Rows((delta * x).sum(3)), "bias": Rows(delta.sum(3))}


def _per_feature(signals: Tensor, normal: Tensor, shape: Sequence[int]) -> dict[str, Term]:
    """``y = w x + b`` for each of the last axes' elements, summed over the axes before."""
    m, k = signals.shape[:2]
    size = math.prod(shape)
    delta, x = signals.reshape(m, k, -1, size), normal.reshape(m, 1, -1, size)
    return {"weight": Rows((delta * x).sum(2)), "bias": Rows(delta.sum(2))}


@register_layer_rule(F.batch_norm)
def batch_norm(
    signals: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """Batch normalisation by running statistics, with any positions after the channels."""
    return _per_channel(signals, F.batch_norm(input, running_mean, running_var, eps=eps))


@register_layer_rule(F.instance_norm)
def instance_norm(
    signals: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """Instance normalisation, by the input's own statistics or by running ones."""
    if use_input_stats:
        running_mean = running_var = None
    normal = F.instance_norm(
        input, running_mean, running_var, use_input_stats=use_input_stats, eps=eps
    )
    return _per_channel(signals, normal)


@register_layer_rule(F.group_norm)
def group_norm(
    signals: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """Group normalisation."""
    return _per_channel(signals, F.group_norm(input, num_groups, eps=eps))


def _has_positions(
    input: Tensor, normalized_shape: Sequence[int], *_: object, **__: object
) -> bool:
    return input.ndim > len(normalized_shape)


@register_layer_rule(F.layer_norm, when=_has_positions)
def layer_norm(
    signals: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """Layer normalisation over the last axes."""
    normal = F.layer_norm(input, normalized_shape, eps=eps)
    return _per_feature(signals, normal, normalized_shape)


@register_layer_rule(F.rms_norm, when=_has_positions)
def rms_norm(
    signals: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[str, Term]:
    """Root-mean-square normalisation over the last axes."""
    normal = F.rms_norm(input, normalized_shape, eps=eps)
    return _per_feature(signals, normal, normalized_shape)
