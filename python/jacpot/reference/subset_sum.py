"""The subset whose sum is nearest to a target, by looking at every subset."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["subset_sum"]


def subset_sum(samples: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest subset sums, from all ``2**n`` of them.

    Parameters
    ----------
    samples
        ``(M, n)``.
    targets
        ``(M,)``.

    Returns
    -------
    mask : Tensor
        ``(M, n)`` bool.
    sums : Tensor
        ``(M,)`` float64.

    Examples
    --------
    >>> subset_sum(torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([0.7]))
    (tensor([[ True,  True, False]]), tensor([0.7500], dtype=torch.float64))
    """
    n = samples.shape[1]
    subsets = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1  # (2**n, n)
    sums = samples.double() @ subsets.double().T  # (M, 2**n)
    best = (sums - targets.double()[:, None]).abs().argmin(dim=1)
    return subsets[best].bool(), sums.gather(1, best[:, None]).squeeze(1)
