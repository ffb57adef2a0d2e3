"""The calls that a network makes, such that those of two runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacpot.tangent.places import Axis

__all__ = ["Course", "Deviates", "Step", "alike", "form_of"]


class Deviates(RuntimeError):
    """The network makes other calls than those that are remembered."""


@dataclass(frozen=True)
class Step:
    """A call, and where the examples are in what it gave.

    Attributes
    ----------
    call
        The function, its tensors by their order of appearance, and all other arguments.
    given
        Axes of the examples.
    """

    call: tuple[Any, tuple[int, ...], Any]
    given: tuple[Axis, ...]


@dataclass
class Course:
    """The calls of a network for ``n`` examples."""

    n: int
    steps: list[Step]


def form_of(x: Any, operands: list[Tensor]) -> Any:
    """Give arguments such that equal ones compare equal; their tensors are found and left out."""
    if isinstance(x, Tensor):
        operands.append(x)
        return Tensor
    kind = type(x)
    if kind is int or x is None:
        return x
    if isinstance(x, tuple | list):
        return kind, *[form_of(value, operands) for value in x]
    if isinstance(x, Mapping):
        return kind, *[(key, form_of(value, operands)) for key, value in x.items()]
    if isinstance(x, slice):  # has no hash; nor has a list, with which a tensor cannot be a key
        ends = x.start, x.stop, x.step
        return slice, *[end if type(end) is int or end is None else [end] for end in ends]
    return kind, x  # True is not 1


def alike(a: Any, n: int, b: Any, m: int) -> bool:
    """Whether arguments for n examples are those for m: sizes may be n or m times the same."""
    if type(a) is int and type(b) is int:
        return a == b or a * m == b * n
    if type(a) is tuple and type(b) is tuple:
        return a == b or (
            len(a) == len(b) and all(alike(x, n, y, m) for x, y in zip(a, b, strict=True))
        )
    return bool(a == b)
