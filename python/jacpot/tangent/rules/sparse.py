"""The library's own layers: those of a dense weight with a mask, and those of kept values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jacpot.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from jacpot.ops.pattern import Pattern
from jacpot.tangent.rules.convolution import convolution
from jacpot.tangent.rules.linear import linear
from jacpot.tangent.rules.registry import register_layer_rule
from jacpot.tangent.rules.terms import Outer, Term

__all__ = ["masked_conv2d", "masked_linear", "sparse_conv2d", "sparse_linear"]


@register_layer_rule(MaskedLinear)
def masked_linear(signals: Tensor, layer: MaskedLinear, x: Tensor) -> Mapping[str, Term]:
    """Its mask is one that the network wears: what is pruned has no column."""
    return linear(signals, x, layer.weight)


def _pads_zeros(layer: MaskedConv2d, x: Tensor) -> bool:
    return layer.padding_mode == "zeros" and x.ndim == 4


@register_layer_rule(MaskedConv2d, when=_pads_zeros)
def masked_conv2d(signals: Tensor, layer: MaskedConv2d, x: Tensor) -> Mapping[str, Term]:
    """As `masked_linear`."""
    settings = layer.stride, layer.padding, layer.dilation, layer.groups
    return convolution(signals, x, layer.weight, layer.bias, *settings)


def _of_values(
    signals: Tensor, layer: SparseLinear | SparseConv2d, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Signals at the product itself, and an expanded weight for its shape."""
    if layer.relu:
        signals = signals * (layer(x) > 0).unsqueeze(1)
    return signals, layer.values.new_empty(()).expand(layer.weight_shape)


def _kept(terms: Mapping[str, Term], layer: SparseLinear | SparseConv2d) -> dict[str, Term]:
    weight = terms["weight"]
    assert isinstance(weight, Outer)
    pattern = Pattern(layer.mask().flatten(1).cpu())
    values = Outer(weight.activations, weight.signals, pattern=pattern)
    return {"values": values, "bias": terms["bias"]}


@register_layer_rule(SparseLinear)
def sparse_linear(signals: Tensor, layer: SparseLinear, x: Tensor) -> Mapping[str, Term]:
    """``y = x Wᵀ + b``, of which the kept weights are the parameter, row by row."""
    signals, weight = _of_values(signals, layer, x)
    return _kept(linear(signals, x, weight), layer)


@register_layer_rule(SparseConv2d)
def sparse_conv2d(signals: Tensor, layer: SparseConv2d, x: Tensor) -> Mapping[str, Term]:
    """As `sparse_linear`, at every place of the kernel."""
    signals, weight = _of_values(signals, layer, x)
    w = layer.window
    terms = convolution(signals, x, weight, None, w.stride, w.padding, w.dilation, w.groups)
    return _kept(terms, layer)
