"""Operators ``y = A x``, linear in one tensor: their derivatives and transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacpot.ops.transforms import is_forward_mode, is_transformed, transformed, vmap_by_one

__all__ = ["Linear"]


class Linear:
    """The calculus of an operator ``name(x, pattern, *settings) -> y`` that is linear in x.

    Its tangent is itself, and its gradient is the operator of its :attr:`transpose`, whose
    settings are the shape of x.

    Parameters
    ----------
    library, name
        Where the operator is defined.
    """

    transpose: Linear

    def __init__(self, library: Any, name: str) -> None:
        self.run: Any = getattr(torch.ops.jacpot, name)
        full = f"jacpot::{name}"
        torch.library.register_autograd(
            full, self.differentiate, setup_context=self.save, lib=library
        )
        torch.library.register_vmap(full, partial(vmap_by_one, self.run), lib=library)
        self.transformed = transformed(
            self.run, self.save, lambda inputs, _: (inputs[1],), self.differentiate, self.push
        )

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        x, pattern, *ctx.settings = inputs
        ctx.save_for_backward(pattern)
        ctx.shape = x.shape

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Pull a gradient back."""
        (pattern,) = ctx.saved_tensors
        return self.transpose(dy, pattern, *ctx.shape), *(None,) * (1 + len(ctx.settings))

    def push(self, ctx: Any, dx: Tensor, *_: None) -> Tensor:
        """Push a tangent forward."""
        (pattern,) = ctx.saved_tensors
        return self(dx, pattern, *ctx.settings)

    def __call__(self, x: Tensor, pattern: Tensor, *settings: int) -> Tensor:
        """Call the operator so that every transform at work sees it."""
        if is_transformed() or is_forward_mode():
            return self.transformed.apply(x, pattern, *settings)  # type: ignore[no-any-return]
        return self.run(x, pattern, *settings)  # type: ignore[no-any-return]
