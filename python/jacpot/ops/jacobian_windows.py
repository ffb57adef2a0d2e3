"""The windows of a convolution: the activations of its weight, written out or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from jacpot._backend import empty, settle, threads
from jacpot.ops.jacobian_blocks import Factors
from jacpot.ops.jacobian_kernels import kernels

__all__ = ["Windows", "windows"]

FEWEST_CHANNELS, FEWEST_PLACES = 8, 64  # from where on minimal filtering takes less time


@dataclass(frozen=True, eq=False)
class Windows:
    """Activations ``(N, T, G, I)`` of a convolution's weight, which are not written out.

    Parameters
    ----------
    x
        ``(N, C, *spatial)``, padded as wanted; float32 or float64.
    kernel, stride, dilation
        One number for each spatial axis.
    groups
        Groups of channels.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> Windows(x, (2,), (1,), (1,)).written()
    tensor([[[[1., 2.]],
    <BLANKLINE>
             [[2., 3.]]]])
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def places(self) -> tuple[int, ...]:
        """Places that the kernel is laid on, along each axis."""
        return _places(self.x.shape[2:], self.kernel, self.stride, self.dilation)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, T, G, I)``."""
        n, channels = self.x.shape[:2]
        inputs = channels // self.groups * math.prod(self.kernel)
        return n, math.prod(self.places), self.groups, inputs

    def __getitem__(self, examples: slice) -> Windows:
        """Those of some of the examples."""
        return replace(self, x=self.x[examples])

    def written(self) -> Tensor:
        """Write them out."""
        return windows(self.x, self.kernel, self.stride, self.dilation).view(self.shape)

    def rows(self, signals: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply with signals ``(N, K, T, G, O)``, into rows ``(N, K, G·O·I)``, contiguous.

        A kernel of 3 x 3 with a stride of 1 takes a fourth of the multiplications, by minimal
        filtering, which leaves ten times the rounding errors: 2e-6 of the largest in float32.
        """
        n, k, t, g, o = signals.shape
        if out is None:
            out = empty((n, k, g * o * self.shape[3]), signals)
        plain = (self.kernel, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))
        channels = min(o, self.x.shape[1] // g)
        if signals.is_cuda or not plain or channels < FEWEST_CHANNELS or t < FEWEST_PLACES:
            self.write_rows(signals, out, 0)
            return out
        planes = signals.permute(0, 1, 3, 4, 2)
        if n and k and not planes[0, 0].is_contiguous():
            planes = planes.contiguous()
        planes = planes.unflatten(4, self.places)  # type: ignore[no-untyped-call]
        kernels(out).jacobian_convolution_rows(self.x.contiguous(), planes, out, threads())
        return out

    def write_rows(self, signals: Tensor, out: Tensor, start: int) -> None:
        """Write the rows to columns of ``out (N, K, P)`` from ``start`` on, by plain sums."""
        if out.numel() == 0:
            return
        if signals.is_cuda:
            factors = Factors(self.written(), signals).for_rows
            kernels(out).jacobian_rows(factors, out, start, threads())
            return
        if 1 not in (signals.stride(2), signals.stride(4)):
            signals = signals.contiguous()
        x = self.x.contiguous()
        places, offsets = _layout(
            x[0, : x.shape[1] // self.groups].shape,
            self.kernel,
            self.stride,
            self.dilation,
            x.device,
        )
        run = self.kernel[-1] if self.dilation[-1] == 1 else 1  # elements next to each other
        kernels(out).jacobian_window_rows(
            x, places, offsets[::run].contiguous(), run, signals, out, start, threads()
        )


def _places(
    spatial: Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Count the places that a kernel is laid on, along each axis."""
    return tuple(
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    )


@lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where in an example ``(C, *spatial)`` each window begins, and its elements from there on."""
    channels, *spatial = shape
    counts = _places(spatial, kernel, stride, dilation)
    places = torch.zeros(1, dtype=torch.int64, device=device)
    step = math.prod(spatial)
    offsets = torch.arange(channels, device=device) * step
    for axis, size in enumerate(spatial):
        step //= max(size, 1)

        def along(count: int, by: int) -> Tensor:
            return torch.arange(count, device=device) * by

        places = (places[:, None] + along(counts[axis], stride[axis] * step)).flatten()
        offsets = (offsets[:, None] + along(kernel[axis], dilation[axis] * step)).flatten()
    settle(offsets)
    return places, offsets


def windows(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Write out every window that a kernel is laid on.

    Parameters
    ----------
    x
        ``(N, C, *spatial)``, padded as wanted; float32 or float64.
    kernel, stride, dilation
        One number for each spatial axis.

    Returns
    -------
    Tensor
        ``(N, T, C·kernel)``: places row by row, each with all channels' elements.

    Examples
    --------
    >>> windows(torch.tensor([[[1.0, 2.0, 3.0]]]), (2,), (1,), (1,))
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    x = x.detach().contiguous()
    places, offsets = _layout(x.shape[1:], kernel, stride, dilation, x.device)
    out = empty((len(x), len(places), len(offsets)), like=x)
    kernels(x).jacobian_windows(x, places, offsets, out, threads())
    return out
