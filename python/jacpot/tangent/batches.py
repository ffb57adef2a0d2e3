"""Random batches of examples, of one size or of a growing one, and samples by importance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Batches", "sample"]

FIRST = 500  # examples of the first batch, where batches grow
EVEN = 0.1  # share of the mean size that is added to all, so that none is left out for ever


class Batches:
    """Batches of n examples, in a new random order each epoch; the last, smaller one is left out.

    Parameters
    ----------
    n
        Examples there are.
    size
        Examples a batch; None for all of them; ``"auto"`` for few at first, to be doubled.
    generator
        Of the order.
    """

    def __init__(
        self, n: int, size: int | Literal["auto"] | None, generator: torch.Generator
    ) -> None:
        if isinstance(size, str) and size != "auto":
            raise ValueError(
                f"argument 'batch_size' must be a number, None or 'auto', got {size!r}"
            )
        if isinstance(size, int) and size < 1:
            raise ValueError(f"argument 'batch_size' must be at least 1, got {size}")
        self._n, self._generator, self._grow = n, generator, size == "auto"
        self._size = n if size is None else FIRST // 2 if size == "auto" else min(size, n)
        self._order, self._at = torch.empty(0, dtype=torch.int64, device="cpu"), 0
        self.double()

    @property
    def whole(self) -> bool:
        """Whether a batch is all examples."""
        return self._size == self._n

    @property
    def growing(self) -> bool:
        """Whether batches can still be doubled."""
        return self._grow and not self.whole

    def double(self) -> bool:
        """Double the batches if they grow, to all examples where half would be exceeded."""
        if not self.growing:
            return False
        self._size = 2 * self._size if 4 * self._size <= self._n else self._n
        return True

    def draw(self) -> slice | Tensor:
        """Give the next batch, as an index of examples."""
        if self.whole:
            return slice(None)
        if self._at + self._size > len(self._order):
            self._order, self._at = (
                torch.randperm(self._n, generator=self._generator, device="cpu"),
                0,
            )
        self._at += self._size
        return self._order[self._at - self._size : self._at]


def sample(sizes: Tensor, count: int, generator: torch.Generator) -> tuple[slice | Tensor, Tensor]:
    """Draw examples with chances in proportion to their sizes; large ones are certain.

    Systematic sampling without replacement (Madow 1949), with the weights of Horvitz & Thompson
    (1952): the weighted mean over the sample estimates the mean over all.

    Parameters
    ----------
    sizes
        (N,), at least zero, of mean one.
    count
        How many, up to one more; N or more for all.
    generator
        On the CPU, as the order of examples is drawn there.

    Returns
    -------
    examples, weights
        An index and what each of them counts.
    """
    n = len(sizes)
    if count >= n:
        return slice(None), torch.ones_like(sizes)
    sizes = sizes + EVEN
    falling, _ = sizes.sort(descending=True)
    rest = falling.flip(0).cumsum(0).flip(0)
    places = torch.arange(count, 0, -1, device=sizes.device)
    # As long as the largest that is left takes more than a whole one of the places left.
    certain = int((falling[:count] * places > rest[:count]).sum())
    chances = (sizes * ((count - certain) / rest[certain])).clamp_max(1)
    order = torch.randperm(n, generator=generator, device="cpu").to(sizes.device)
    start = float(torch.rand(1, generator=generator, device="cpu"))
    ends = (chances[order].cumsum(0) + start).floor()
    chosen = order[ends > torch.cat([ends.new_zeros(1), ends[:-1]])]
    return chosen, len(chosen) / (n * chances[chosen])
