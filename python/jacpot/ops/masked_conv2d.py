"""Two-dimensional convolution with a sparse masked weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jacpot.ops.masked_conv2d_operators import multiply
from jacpot.ops.masked_matmul import check_dtypes, expand_block, product
from jacpot.ops.pattern import Pattern

__all__ = ["Window", "convolve", "dense_is_faster", "masked_conv2d", "window_of"]


class Window(NamedTuple):
    """How the kernel of a convolution moves; pairs are (height, width)."""

    channels: int
    groups: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def pairs(self) -> list[int]:
        """Give size, stride, padding and dilation in one list."""
        return [*self.size, *self.stride, *self.padding, *self.dilation]

    def flatten(self, weight: Tensor) -> Tensor:
        """Give a weight ``(out, in / groups, h, w)`` as ``(out, in · h · w)``.

        Groups become blocks on the diagonal, so that order and number of kept entries stay.
        """
        rows = weight.reshape(weight.shape[0], -1)
        if self.groups == 1:
            return rows
        columns = rows.shape[1]
        flat = rows.new_zeros(rows.shape[0], self.groups * columns)
        for group, part in enumerate(rows.chunk(self.groups)):
            first = group * part.shape[0]
            flat[first : first + part.shape[0], group * columns : (group + 1) * columns] = part
        return flat

    def unflatten(self, weight: Tensor) -> Tensor:
        """Undo :meth:`flatten`."""
        out = weight.shape[0]
        blocks = weight.view(self.groups, out // self.groups, self.groups, -1)
        rows = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return rows.reshape(out, self.channels // self.groups, *self.size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Give height and width of the output."""
        first, second = (
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, p, d, k, s in zip(
                (height, width), self.padding, self.dilation, self.size, self.stride, strict=True
            )
        )
        return first, second


def window_of(
    shape: tuple[int, ...],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Window:
    """Check and complete the settings of a convolution with a weight of this shape."""
    out, per_group, height, width = shape
    if groups < 1 or out % groups:
        raise ValueError(f"argument 'groups' must divide the {out} output channels, got {groups}")
    pairs = []
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        pair = (value, value) if isinstance(value, int) else value
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(v, int) for v in pair):
            raise ValueError(f"argument {name!r} must be an int or a pair of them, got {value!r}")
        first, second = pair
        if min(first, second) < least:
            raise ValueError(f"argument {name!r} must be at least {least}, got {value}")
        pairs.append((int(first), int(second)))
    return Window(per_group * groups, groups, (height, width), *pairs)


def dense_is_faster(shape: tuple[int, int], nnz: int, window: Window) -> bool:
    """Whether a dense convolution with the expanded weight is expected to take less time.

    Measured: 3x3 kernels still win by a tenth at half the weights.
    """
    return nnz * window.groups > 0.55 * shape[0] * shape[1]


def convolve(
    x: Tensor,
    values: Tensor,
    block: Tensor,
    shape: tuple[int, int],
    nnz: int,
    bias: Tensor | None,
    window: Window,
    *,
    relu: bool = False,
    method: str = "auto",
) -> Tensor:
    """Convolve with a compiled pattern that is given by its block."""
    if x.dim() != 4 or x.shape[1] != window.channels:
        raise ValueError(
            f"argument 'x' must have shape (N, {window.channels}, height, width), "
            f"got {tuple(x.shape)}"
        )
    height, width = window.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"argument 'x' is smaller than the kernel: {tuple(x.shape)} for {window.size}"
        )
    check_dtypes(x, values, bias)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Sums are taken in float32.
        wide_bias = None if bias is None else bias.float()
        y = convolve(
            x.float(),
            values.float(),
            block,
            shape,
            nnz,
            wide_bias,
            window,
            relu=relu,
            method=method,
        )
        return y.to(torch.bfloat16)
    if method == "dense" or (method == "auto" and dense_is_faster(shape, nnz, window)):
        weight = window.unflatten(expand_block(values, block, shape))
        y = torch.nn.functional.conv2d(
            x, weight, bias, window.stride, window.padding, window.dilation, window.groups
        )
        return torch.relu(y) if relu else y
    if x.device.type == "cpu":
        return multiply(x, values, bias, block, shape[0], relu, window.pairs())
    patches = torch.nn.functional.unfold(
        x, window.size, window.dilation, window.padding, window.stride
    )
    # (N, features, positions) -> one example for each position of each image
    examples = patches.transpose(0, 1).reshape(shape[1], -1).t()
    y = product(
        examples, values, block, shape, nnz, bias, relu=relu, layout="feature", method="sparse"
    )
    return y.t().reshape(shape[0], x.shape[0], height, width).transpose(0, 1)


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    window: Window,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    method: str = "auto",
) -> Tensor:
    """Convolve images with a sparse kernel.

    Parameters
    ----------
    x
        ``(N, in, height, width)``, float32, float64 or bfloat16 (summed in float32).
    values
        ``(nnz,)``: kept entries of the weight ``(out, in / groups, h, w)`` in row order.
    pattern
        Of the flattened weight, see :meth:`Window.flatten`.
    window
        How the kernel moves.
    bias
        ``(out,)`` or None.
    relu
        Apply ``max(·, 0)`` to the result.
    method
        ``"sparse"``, ``"dense"`` or ``"auto"``, the one expected to be faster.

    Returns
    -------
    Tensor
        ``(N, out, height', width')``, differentiable.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.ops.masked_conv2d import masked_conv2d, window_of
    >>> mask = torch.rand(4, 3, 3, 3) < 0.5
    >>> window = window_of(mask.shape, padding=1)
    >>> pattern = jacpot.Pattern(window.flatten(mask))
    >>> masked_conv2d(torch.ones(2, 3, 8, 8), torch.ones(pattern.nnz), pattern, window).shape
    torch.Size([2, 4, 8, 8])
    """
    return convolve(
        x,
        values,
        pattern.block,
        pattern.shape,
        pattern.nnz,
        bias,
        window,
        relu=relu,
        method=method,
    )
