"""The subset of a few numbers whose sum is nearest to a target, for many targets at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from jacpot import _backend
from jacpot.ops.arrays import as_kind, as_tensor, kind_of

__all__ = ["SubsetSum", "subset_sum"]


class SubsetSum(NamedTuple):
    """Nearest subsets.

    Attributes
    ----------
    mask
        ``(M, n)`` bool: which samples are in the subset of each target.
    sums
        ``(M,)`` float64: the sums of those samples.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> mask, sums = tickets.subset_sum(torch.tensor([[2.0, 3.0, 7.0]]), torch.tensor([9.0]))
    >>> mask.tolist(), sums.tolist()
    ([[True, False, True]], [9.0])
    """

    mask: Any
    sums: Any


def subset_sum(samples: Any, targets: Any) -> SubsetSum:
    """Find, for each target, the subset of its samples whose sum is nearest.

    Exact, by meeting in the middle (Horowitz and Sahni 1974): ``O(2**(n / 2))`` a target. The
    empty subset, whose sum is zero, counts. Lueker (1998): for samples uniform on [-1, 1],
    ``n = O(log(1 / epsilon))`` of them suffice to come within epsilon of any target in
    [-1/2, 1/2] with high probability.

    Parameters
    ----------
    samples
        ``(M, n)``, float32 or float64, finite, NumPy or PyTorch on the CPU; ``n`` up to 32.
    targets
        ``(M,)`` of the same kind and dtype.

    Returns
    -------
    SubsetSum
        ``mask`` and ``sums``, arrays of the same kind.

    Raises
    ------
    TypeError
        If an argument is no array, or of another dtype.
    ValueError
        If a shape is wrong or a value is not finite.
    NotImplementedError
        If there are more than 32 samples a target.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> found = tickets.subset_sum(torch.tensor([[0.5, -0.2, 0.9]]), torch.tensor([0.31]))
    >>> found.mask.tolist(), round(found.sums.item(), 6)
    ([[True, True, False]], 0.3)
    """
    kind = kind_of(samples)
    x = as_tensor("samples", samples).detach()
    y = as_tensor("targets", targets, kind).detach()
    if x.dim() != 2:
        raise ValueError(f"argument 'samples' must have shape (M, n), got {tuple(x.shape)}")
    for name, array in (("samples", x), ("targets", y)):
        if not bool(torch.isfinite(array).all()):
            raise ValueError(f"argument {name!r} must be finite")
    subsets = torch.empty(len(x), dtype=torch.int64, device="cpu")
    sums = torch.empty(len(x), dtype=torch.float64, device="cpu")
    _backend.core.subset_sum(x, y, subsets, sums, _backend.threads())
    mask = ((subsets[:, None] >> torch.arange(x.shape[1], device="cpu")) & 1).bool()
    return SubsetSum(as_kind(mask, kind), as_kind(sums, kind))
