"""The windows of a convolution, written out: the activations of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from jacpot._backend import empty, threads
from jacpot.ops.jacobian_kernels import kernels

__all__ = ["windows"]


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
    spatial = x.shape[2:]
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    ]
    places = torch.zeros(1, dtype=torch.int64, device=x.device)
    offsets = torch.arange(x.shape[1], device=x.device) * spatial.numel()
    step = spatial.numel()
    for axis, size in enumerate(spatial):
        step //= max(size, 1)

        def along(count: int, by: int) -> Tensor:
            return torch.arange(count, device=x.device) * by

        places = (places[:, None] + along(counts[axis], stride[axis] * step)).flatten()
        offsets = (offsets[:, None] + along(kernel[axis], dilation[axis] * step)).flatten()
    out = empty((len(x), len(places), len(offsets)), like=x)
    kernels(x).jacobian_windows(x, places, offsets, out, threads())
    return out
