"""Elastic tickets: a mask of one network, stretched or squeezed onto a deeper or shallower one.

Chen et al. 2021, *The elastic lottery ticket hypothesis*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from jacpot.nn.worn import named_parameters
from jacpot.tickets.mask import Mask

__all__ = ["elastic"]

_Kind = tuple[str, tuple[int, ...]]


def elastic(
    mask: Mapping[str, Tensor],
    target: nn.Module,
    order: Literal["interleaved", "appended"] = "interleaved",
) -> Mask:
    """Transfer a ticket to a network of the same family with more or fewer layers.

    Parameters of one kind (the same name but for the numbers in it, the same shape) are taken for
    a stack, in order. The layers of the target's stack take the masks of the source's.

    Parameters
    ----------
    mask
        Of the source network.
    target
        The deeper or shallower network.
    order
        ``"interleaved"`` repeats each layer's mask in place (layers 1 1 2 2 3 3); ``"appended"``
        repeats the stack (1 2 3 1 2 3). Squeezing drops evenly, or from the end.

    Returns
    -------
    Mask
        For the target's parameters that the source has a stack for; others stay whole.

    Raises
    ------
    ValueError
        If nothing fits.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> def net(depth):
    ...     return torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(depth)))
    >>> source = Mask.ones(net(2))
    >>> list(tickets.elastic(source, net(4)))
    ['0.weight', '1.weight', '2.weight', '3.weight']
    """
    if order not in ("interleaved", "appended"):
        raise ValueError(f"argument 'order' must be 'interleaved' or 'appended', got {order!r}")
    stacks = _stacks({name: tuple(kept.shape) for name, kept in mask.items()})
    shapes = {name: tuple(p.shape) for name, p in named_parameters(target).items()}
    sources: dict[str, str] = {}
    for kind, names in _stacks(shapes).items():
        source = stacks.get(kind, [])
        for index, name in enumerate(names if source else ()):
            if order == "appended":
                sources[name] = source[index % len(source)]
            else:
                sources[name] = source[index * len(source) // len(names)]
    if not sources:
        raise ValueError(
            "argument 'target' must have a parameter of the name and shape of one that 'mask' "
            f"names, got {', '.join(shapes) or 'none'}"
        )
    return Mask({name: mask[sources[name]] for name in shapes if name in sources})


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[_Kind, list[str]]:
    stacks: dict[_Kind, list[str]] = {}
    for name, shape in shapes.items():
        stacks.setdefault((re.sub(r"\d+", "#", name), shape), []).append(name)
    return stacks
