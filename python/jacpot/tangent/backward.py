"""Many cotangents taken back through a network at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _remove_batch_dim
from torch._functorch.vmap import (  # type: ignore[attr-defined]
    lazy_load_decompositions,
    vmap_increment_nesting,
)

from jacpot._backend import empty

__all__ = ["cannot_map", "signals"]


def signals(
    outputs: Tensor,
    sources: Sequence[Any],
    cotangents: Tensor,
    together: bool = True,
    known: bool = False,
) -> Sequence[Tensor | None]:
    """Pass ``(B, N, K)`` cotangents back to tensors or edges of the graph.

    Gives ``(B, *source)`` for each, None where nothing leads. All cotangents go back ``together``
    or, which needs less memory on the way, one after the other. ``known`` says that the graph holds
    only functions which `torch.func.vmap` is known to take back as they are: of some, such as
    ``torch.cdist``, it gives wrong derivatives.
    """
    led = [source for source in sources if source is not None]
    if not led or not outputs.requires_grad:
        return [None] * len(sources)
    if len(led) < len(sources):  # what the network evaluates under torch.no_grad has no place
        found = iter(signals(outputs, led, cotangents, together, known))
        return [None if source is None else next(found) for source in sources]
    if not together:
        return _one_by_one(outputs, sources, cotangents)
    try:
        with warnings.catch_warnings():
            # what torch warns of here, derivatives taken one after the other, is exact as well
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if known:
                return _mapped(outputs, sources, cotangents)
            return torch.autograd.grad(
                outputs, sources, cotangents,
                is_grads_batched=True, retain_graph=True, allow_unused=True,
            )  # fmt: skip
    except RuntimeError as error:
        if not cannot_map(error):
            raise
    return _one_by_one(outputs, sources, cotangents)


def _mapped(outputs: Tensor, sources: Sequence[Any], cotangents: Tensor) -> Sequence[Tensor | None]:
    """Give what ``is_grads_batched`` does, an older vmap that cannot batch our operators."""
    b = len(cotangents)
    lazy_load_decompositions()
    with vmap_increment_nesting(b, "error") as level:  # all that torch.func.vmap does
        one = _add_batch_dim(cotangents, 0, level)
        found = torch.autograd.grad(outputs, sources, one, allow_unused=True, retain_graph=True)
        return [None if x is None else _remove_batch_dim(x, level, b, 0) for x in found]


def _one_by_one(
    outputs: Tensor, sources: Sequence[Any], cotangents: Tensor
) -> Sequence[Tensor | None]:
    """Give ``(B, *source)`` for each source, in memory that has ``source[0]`` before B."""
    b = len(cotangents)
    found: list[Tensor | None] = [None] * len(sources)
    for i, one in enumerate(cotangents):
        gradients = torch.autograd.grad(outputs, sources, one, allow_unused=True, retain_graph=True)
        for j, gradient in enumerate(gradients):
            room = found[j]
            if room is None and gradient is not None:
                if b == 1:
                    found[j] = gradient.unsqueeze(0)
                    continue
                ahead = gradient.shape[:1]
                room = empty((*ahead, b, *gradient.shape[1:]), gradient).movedim(len(ahead), 0)
                found[j] = room
                room[:i] = 0
            if room is not None:
                room[i] = 0 if gradient is None else gradient
    return found


def cannot_map(error: RuntimeError) -> bool:
    """Whether this is torch saying that `vmap` does not know an operation."""
    return "vmap" in str(error).lower() or "batching rule" in str(error).lower()
