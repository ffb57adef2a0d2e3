"""Layers with a dense weight and a mask that may change: for the search of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MaskedConv2d", "MaskedLinear"]


def _checked(mask: Tensor, weight: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"argument 'mask' must be bool, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"argument 'mask' must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    return mask.detach().to(weight.device, copy=True)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied with a mask.

    Every entry of the weight is kept, and has a gradient where the mask is True (zero elsewhere).
    The mask is a buffer: change it in place or assign another one at any time. For speed, turn
    the layer into a :class:`jacpot.nn.SparseLinear` when the mask is found.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As of :class:`torch.nn.Linear`.
    mask
        ``(out_features, in_features)``, boolean; all True by default.

    Examples
    --------
    >>> import torch
    >>> from jacpot.nn import MaskedLinear
    >>> layer = MaskedLinear(3, 2, mask=torch.zeros(2, 3, dtype=torch.bool), bias=False)
    >>> layer(torch.ones(1, 3)).tolist()
    [[0.0, 0.0]]
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        mask = torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask
        self.register_buffer("mask", _checked(mask, self.weight))

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor) -> MaskedLinear:
        """Mask a linear layer; the weight and bias are shared with it."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.mask = _checked(mask, linear.weight)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return a linear layer with the masked weight (copied)."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            self.weight.device,
            self.weight.dtype,
        )
        _copy(self, linear)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return functional.linear(x, self.weight * self.mask, self.bias)


class MaskedConv2d(nn.Conv2d):
    """A convolution whose weight is multiplied with a mask: see :class:`MaskedLinear`.

    Parameters
    ----------
    args, kwargs
        Of :class:`torch.nn.Conv2d`.
    mask
        Of the shape of the weight, boolean; all True by default.

    Examples
    --------
    >>> import torch
    >>> from jacpot.nn import MaskedConv2d
    >>> mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    >>> mask[:, :, 1] = False
    >>> MaskedConv2d(1, 2, 3, mask=mask)(torch.randn(1, 1, 5, 5)).shape
    torch.Size([1, 2, 3, 3])
    """

    mask: Tensor

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mask = torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask
        self.register_buffer("mask", _checked(mask, self.weight))

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, mask: Tensor) -> MaskedConv2d:
        """Mask a convolution; the weight and bias are shared with it."""
        layer = cls(**_settings(conv), device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.mask = _checked(mask, conv.weight)
        return layer.train(conv.training)

    def to_conv2d(self) -> nn.Conv2d:
        """Return a convolution with the masked weight (copied)."""
        conv = nn.Conv2d(**_settings(self), device=self.weight.device, dtype=self.weight.dtype)
        _copy(self, conv)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in, height, width)`` to ``(N, out, height', width')``."""
        y: Tensor = self._conv_forward(x, self.weight * self.mask, self.bias)
        return y


def _settings(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    settings = {name: getattr(conv, name) for name in (*names, "groups", "padding_mode")}
    return {**settings, "bias": conv.bias is not None}


def _copy(masked: MaskedLinear | MaskedConv2d, dense: nn.Linear | nn.Conv2d) -> None:
    with torch.no_grad():
        dense.weight.copy_(masked.weight * masked.mask)
        if masked.bias is not None and dense.bias is not None:
            dense.bias.copy_(masked.bias)
    dense.train(masked.training)
