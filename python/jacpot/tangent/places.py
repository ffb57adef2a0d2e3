"""Where the examples are in a tensor, and how to find them where elements have only been moved.

Examples are *along* an axis of a tensor if that axis has ``r n s`` entries, ``s`` in a row for each
of the n examples, all of that ``r`` times, and no entry depends on other examples than its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacpot._backend import settle
from jacpot.tangent.network import over_tensors, tensors

__all__ = ["Axis", "Examples", "Place", "Places", "moved"]

Axis: TypeAlias = int | None
Place: TypeAlias = tuple[int, int]  # the axis, and the rounds r
Places: TypeAlias = list[Place | None]


@dataclass(frozen=True)
class Examples:
    """How many there are, and where they are in a tensor; None for what is none of theirs."""

    n: int
    place: Callable[[Any], Place | None]

    def axis(self, value: Any) -> Axis:
        """The axis along which they are."""
        place = self.place(value)
        return None if place is None else place[0]


def moved(function: Callable[..., Any], examples: Examples, *args: Any, **kwargs: Any) -> Any:
    """Of functions that only move elements: move the examples' numbers, and look where they are."""
    values = [*args, *kwargs.values()]
    if not any(examples.axis(x) is not None and x.numel() for x in tensors(values)):
        return None
    labels = over_tensors(values, lambda x: _labels(examples, x))
    given = function(*labels[: len(args)], **dict(zip(kwargs, labels[len(args) :], strict=True)))
    return [_along(x, examples.n) for x in tensors(given)]


def _labels(examples: Examples, x: Tensor) -> Tensor:
    place = examples.place(x)
    if place is None:
        return x.new_full((), -1, dtype=torch.int64).expand(x.shape)
    return _numbers(examples.n, x.shape[place[0]], place, x.ndim, x.device).expand(x.shape)


def _numbers(n: int, size: int, place: Place, ndim: int, device: torch.device) -> Tensor:
    """The examples' numbers along their axis: ``size`` entries, and one along all other axes."""
    axis, rounds = place
    line = _line if size <= 4096 else _line.__wrapped__  # keep short ones only
    return line(n, size, rounds, device).view(*(-1 if a == axis else 1 for a in range(ndim)))


@functools.lru_cache(64)
def _line(n: int, size: int, rounds: int, device: torch.device) -> Tensor:
    line = torch.arange(n, device=device).repeat_interleave(size // (n * rounds)).repeat(rounds)
    settle(line)
    return line


def _along(labels: Tensor, n: int) -> Place | None:
    """Where these are the numbers of the examples."""
    if labels.numel() == 0:
        return None
    # most often labels are views with a single axis that has a stride
    varies = [s != 0 and m > 1 for s, m in zip(labels.stride(), labels.shape, strict=True)]
    for axis, size in enumerate(labels.shape):
        line = labels[tuple(slice(None) if a == axis else 0 for a in range(labels.ndim))]
        in_a_row = int((line != 0).int().argmax())  # until the second example
        if in_a_row == 0 or size % (n * in_a_row):
            continue
        place = axis, size // (n * in_a_row)
        expected = _numbers(n, size, place, labels.ndim, labels.device)
        rest = [slice(None) if v or a == axis else slice(1) for a, v in enumerate(varies)]
        if bool((labels[tuple(rest)] == expected).all()):
            return place
    return None
