"""Layers that hold only the kept weights: time and memory fall with density."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from jacpot.ops.masked_conv2d import Window, convolve, window_of
from jacpot.ops.masked_matmul import expand, product
from jacpot.ops.pattern import Pattern

__all__ = ["SparseConv2d", "SparseLinear", "zero_padding"]


class _Sparse(nn.Module):
    """Values, bias and the compiled pattern, whose block is a buffer and so in `state_dict`.

    A state of another pattern is loaded with ``assign=True`` only: its values belong to other
    places, and the moments that an optimizer has of the old ones mean nothing to them.
    """

    block: Tensor
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, pattern: Pattern, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("block", pattern.block)
        self.values = nn.Parameter(values)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._shape = pattern.shape
        self._nnz = pattern.nnz

    @property
    def pattern(self) -> Pattern:
        """The compiled pattern."""
        return Pattern.from_block(self.block)

    @property
    def density(self) -> float:
        """Kept share of the weight."""
        return self._nnz / max(1, math.prod(self.weight_shape))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self._shape

    def mask(self) -> Tensor:
        """Return the boolean mask, of the shape of the dense weight."""
        return self._dense(torch.ones_like(self.values)).to(torch.bool)

    def weight(self) -> Tensor:
        """Return the dense weight, with zeros where nothing is kept; differentiable."""
        return self._dense(self.values)

    def _dense(self, values: Tensor) -> Tensor:
        return expand(values, self.pattern).view(self.weight_shape)

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values and bias: under autocast, of the dtype of x."""
        if not isinstance(x, Tensor):
            raise TypeError(f"argument 'x' must be a torch.Tensor, got {type(x).__name__}")
        values, bias = self.values, self.bias
        if x.dtype == values.dtype or not torch.is_autocast_enabled(x.device.type):
            return values, bias
        return values.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        block = state_dict.get(prefix + "block")
        if block is not None and not torch.equal(block.cpu(), self.block.cpu()):
            pattern = Pattern.from_block(block.to(self.block.device))
            if pattern.shape != self._shape:
                error_msgs.append(
                    f"the pattern of {prefix}block must have shape {self._shape}, "
                    f"got {pattern.shape}"
                )
                return
            if not local_metadata.get("assign_to_params_buffers", False):
                error_msgs.append(
                    f"{prefix}block is another pattern, to whose values the moments of an "
                    "optimizer would not belong: load with assign=True, and make the optimizer "
                    "afterwards"
                )
                return
            self.block, self._nnz = pattern.block.clone(), pattern.nnz
            values = self.values.detach().new_empty(pattern.nnz)
            self.values = nn.Parameter(values, self.values.requires_grad)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _uniform(values: Tensor, bias: Tensor | None, fan_in: int) -> None:
    """Initialise as :class:`torch.nn.Linear` and :class:`torch.nn.Conv2d` do."""
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    for tensor in (values, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)


class SparseLinear(_Sparse):
    """A linear layer that holds only its kept weights.

    Parameters
    ----------
    mask
        ``(out, in)``, boolean, or a compiled :class:`jacpot.Pattern`.
    bias
        Whether there is one.
    relu
        Apply ``max(·, 0)`` to the output, at no cost.
    layout
        Memory layout of the output, see :func:`jacpot.masked_matmul`: ``"feature"`` between
        sparse layers saves their transposes.
    dtype, device
        Of the values.

    Examples
    --------
    >>> import torch
    >>> from jacpot.nn import SparseLinear
    >>> layer = SparseLinear(torch.tensor([[True, False, True], [False, False, True]]))
    >>> layer.values.shape, layer(torch.ones(5, 3)).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        mask: Tensor | Pattern,
        bias: bool = True,
        *,
        relu: bool = False,
        layout: str = "row",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if layout not in ("row", "feature"):
            raise ValueError(f"argument 'layout' must be 'row' or 'feature', got {layout!r}")
        pattern = mask if isinstance(mask, Pattern) else Pattern(mask)
        pattern = pattern if device is None else pattern.to(device)
        options: dict[str, Any] = {"dtype": dtype, "device": pattern.device}
        values = torch.empty(pattern.nnz, **options)
        offset = torch.empty(pattern.shape[0], **options) if bias else None
        _uniform(values, offset, pattern.shape[1])
        super().__init__(pattern, values, offset)
        self.relu = relu
        self.layout = layout

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor, *, relu: bool = False, layout: str = "row"
    ) -> SparseLinear:
        """Keep the masked weights of a linear layer (copied)."""
        pattern = Pattern(mask.to(linear.weight.device))
        layer = cls(
            pattern, linear.bias is not None, relu=relu, layout=layout, dtype=linear.weight.dtype
        )
        _copy(layer, linear, pattern.compress(linear.weight.detach()))
        return layer

    def to_linear(self) -> nn.Linear:
        """Return the dense layer, with zeros in its weight."""
        linear = nn.Linear(
            self._shape[1],
            self._shape[0],
            self.bias is not None,
            dtype=self.values.dtype,
            device=self.values.device,
        )
        _copy_back(linear, self)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        values, bias = self._parameters_for(x)
        return product(
            x,
            values,
            self.block,
            self._shape,
            self._nnz,
            bias,
            relu=self.relu,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        out_features, in_features = self._shape
        return (
            f"in_features={in_features}, out_features={out_features}, "
            f"bias={self.bias is not None}, density={self.density:.3g}"
        )


class SparseConv2d(_Sparse):
    """A two-dimensional convolution that holds only its kept weights.

    Parameters
    ----------
    mask
        ``(out, in / groups, height, width)``, boolean.
    stride, padding, dilation, groups
        As of :class:`torch.nn.Conv2d`; padding is with zeros, an int or a pair.
    bias
        Whether there is one.
    relu
        Apply ``max(·, 0)`` to the output, at no cost.
    dtype, device
        Of the values.

    Examples
    --------
    >>> import torch
    >>> from jacpot.nn import SparseConv2d
    >>> mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    >>> mask[:, :, 1] = False
    >>> SparseConv2d(mask)(torch.randn(1, 1, 5, 5)).shape
    torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        mask: Tensor,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        relu: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if mask.dim() != 4:
            raise ValueError(
                f"argument 'mask' must have shape (out, in / groups, height, width), "
                f"got {tuple(mask.shape)}"
            )
        mask = mask if device is None else mask.to(device)
        window = window_of(mask.shape, stride, padding, dilation, groups)
        pattern = Pattern(window.flatten(mask))
        options: dict[str, Any] = {"dtype": dtype, "device": mask.device}
        values = torch.empty(pattern.nnz, **options)
        offset = torch.empty(mask.shape[0], **options) if bias else None
        _uniform(values, offset, math.prod(mask.shape[1:]))
        super().__init__(pattern, values, offset)
        self.window: Window = window
        self.relu = relu

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, mask: Tensor, *, relu: bool = False) -> SparseConv2d:
        """Keep the masked weights of a convolution (copied).

        Raises
        ------
        ValueError
            If it pads with something else than zeros, or both sides differently.
        """
        padding = zero_padding(conv)
        if padding is None:
            raise ValueError(
                "argument 'conv' must pad with zeros, both sides alike, got "
                f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
            )
        mask = mask.to(conv.weight.device)
        layer = cls(
            mask,
            _pair(conv.stride),
            padding,
            _pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            relu=relu,
            dtype=conv.weight.dtype,
        )
        _copy(layer, conv, conv.weight.detach()[mask])
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """Return the dense convolution, with zeros in its weight."""
        window = self.window
        conv = nn.Conv2d(
            window.channels,
            self._shape[0],
            window.size,
            window.stride,
            window.padding,
            window.dilation,
            window.groups,
            self.bias is not None,
            dtype=self.values.dtype,
            device=self.values.device,
        )
        _copy_back(conv, self)
        return conv

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        window = self.window
        return (self._shape[0], window.channels // window.groups, *window.size)

    def _dense(self, values: Tensor) -> Tensor:
        return self.window.unflatten(self.pattern.expand(values))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in, height, width)`` to ``(N, out, height', width')``."""
        values, bias = self._parameters_for(x)
        return convolve(
            x,
            values,
            self.block,
            self._shape,
            self._nnz,
            bias,
            self.window,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        window = self.window
        return (
            f"{window.channels}, {self._shape[0]}, kernel_size={window.size}, "
            f"stride={window.stride}, padding={window.padding}, dilation={window.dilation}, "
            f"groups={window.groups}, bias={self.bias is not None}, density={self.density:.3g}"
        )


def zero_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros that a convolution adds at both sides alike, or None if it pads otherwise."""
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return 0, 0
    if isinstance(conv.padding, str):  # "same"
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in totals) else (totals[0] // 2, totals[1] // 2)
    return _pair(conv.padding)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    first, second = value
    return first, second


def _copy(layer: _Sparse, dense: nn.Linear | nn.Conv2d, values: Tensor) -> None:
    with torch.no_grad():
        layer.values.copy_(values)
        if layer.bias is not None and dense.bias is not None:
            layer.bias.copy_(dense.bias)
    layer.values.requires_grad_(dense.weight.requires_grad)
    layer.train(dense.training)


def _copy_back(dense: nn.Linear | nn.Conv2d, layer: _Sparse) -> None:
    with torch.no_grad():
        dense.weight.copy_(layer.weight())
        if layer.bias is not None and dense.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.train(layer.training)
