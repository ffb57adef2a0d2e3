"""Operators ``y = max(S(x, v) + bias, 0)`` with S bilinear: their derivatives and transforms.

The gradients of S are bilinear, too: the transposed product ``Sᵀ(dy, v)`` and the product of dy
and x sampled on the pattern. So a forward and a backward operator are closed under
differentiation, of any order and in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jacpot.ops.transforms import (
    is_forward_mode,
    is_transformed,
    needs_operators,
    transformed,
    vmap_by_one,
)

__all__ = ["Bilinear"]


class Bilinear:
    """The calculus of one forward and one backward operator.

    They are ``forward(x, values, bias?, pattern, out, relu, setting) -> y``, with examples along
    the first and ``out`` features along the second dimension of y, and
    ``backward(dy, x, values, pattern, want_x, want_values, *geometry) -> (dx, d_values)``, which
    gives something empty for what is not wanted.

    Parameters
    ----------
    library, name
        Where the operators are defined: ``name`` and ``name_backward``.
    forward, backward
        What they do on a CPU, called without the dispatcher's detours where nobody listens.
    plain
        The setting that is free to choose, or None where it is the geometry of S: then the
        gradients take it as well.
    """

    def __init__(
        self,
        library: Any,
        name: str,
        forward: Callable[..., Tensor],
        backward: Callable[..., tuple[Tensor, Tensor]],
        plain: Any = None,
    ) -> None:
        self.forward_cpu, self.backward_cpu, self.plain = forward, backward, plain
        self.run: Any = getattr(torch.ops.jacpot, name)
        self.run_backward: Any = getattr(torch.ops.jacpot, f"{name}_backward")
        library.impl(name, forward, "CPU")
        library.impl(f"{name}_backward", backward, "CPU")
        for operator, gradient, save, batch in (
            (name, self.differentiate, self.save, self.vmap),
            (
                f"{name}_backward",
                self.differentiate_gradients,
                self.save_gradients,
                partial(vmap_by_one, self.run_backward),
            ),
        ):
            full = f"jacpot::{operator}"
            torch.library.register_autograd(full, gradient, setup_context=save, lib=library)
            torch.library.register_vmap(full, batch, lib=library)
        self.direct = _direct(self)
        self.transformed = transformed(
            self.run,
            self.save,
            lambda inputs, y: (inputs[0], inputs[1], inputs[3], y if inputs[5] else None),
            self.differentiate,
            lambda ctx, *tangents: self.push(ctx, *tangents[:3]),
        )
        self.gradients_transformed = transformed(
            self.run_backward,
            self.save_gradients,
            lambda inputs, _: inputs[:4],
            self.differentiate_gradients,
            lambda ctx, *tangents: self.push_gradients(ctx, *tangents[:3]),
        )

    def geometry(self, setting: Any) -> tuple[Any, ...]:
        """Give what the gradients take of the setting."""
        return (setting,) if self.plain is None else ()

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives of the forward operator need."""
        x, values, bias, pattern, ctx.out, relu, ctx.setting = inputs
        ctx.save_for_backward(x, values, pattern, output if relu else None)
        ctx.has_bias, ctx.shape = bias is not None, output.shape

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Pull a gradient back through the forward operator."""
        x, values, pattern, positive = ctx.saved_tensors
        if positive is not None:
            dy = dy * (positive > 0)
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        dx = d_values = d_bias = None
        if want_x or want_values:
            geometry = self.geometry(ctx.setting)
            dx, d_values = self.gradients(dy, x, values, pattern, want_x, want_values, *geometry)
        if ctx.has_bias and want_bias:
            d_bias = dy.sum([d for d in range(dy.dim()) if d != 1])
        return dx if want_x else None, d_values if want_values else None, d_bias, *(None,) * 4

    def gradients(self, dy: Tensor, *args: Any) -> Any:
        """Call the backward operator by the shortest way that keeps listeners informed."""
        if is_transformed() or is_forward_mode():
            return self.gradients_transformed.apply(dy, *args)
        if torch.is_grad_enabled() or needs_operators(dy):
            return self.run_backward(dy, *args)
        return self.backward_cpu(dy, *args)

    def save_gradients(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the derivatives of the backward operator need."""
        dy, x, values, pattern, want_x, want_values, *ctx.geometry = inputs
        ctx.save_for_backward(dy, x, values, pattern)
        ctx.wanted = want_x, want_values

    def differentiate_gradients(self, ctx: Any, gx: Tensor, gv: Tensor) -> tuple[Any, ...]:
        """Pull gradients back through the backward operator."""
        dy, x, values, pattern = ctx.saved_tensors
        has_gx, has_gv = ctx.wanted
        need_dy, need_x, need_values = ctx.needs_input_grad[:3]
        settings = dy.shape[1], False, *(ctx.geometry or (self.plain,))
        d_dy = d_x = d_values = None
        if need_dy and has_gx:
            d_dy = self(gx, values, None, pattern, *settings)
        if need_dy and has_gv:
            other = self(x, gv, None, pattern, *settings)
            d_dy = other if d_dy is None else d_dy + other
        if need_x and has_gv:
            d_x, _ = self.gradients(dy, x, gv, pattern, True, False, *ctx.geometry)
        if need_values and has_gx:
            _, d_values = self.gradients(dy, gx, values, pattern, False, True, *ctx.geometry)
        return d_dy, d_x, d_values, *(None,) * (3 + len(ctx.geometry))

    def push(self, ctx: Any, dx: Any, d_values: Any, d_bias: Any) -> Tensor:
        """Push tangents, any of which may be None, forward."""
        x, values, pattern, positive = ctx.saved_tensors
        terms = [
            self(a, v, None, pattern, ctx.out, False, ctx.setting)
            for a, v in ((dx, values), (x, d_values))
            if a is not None and v is not None
        ]
        # PyTorch turns forward mode off in here, for outer levels too; the terms, by functions,
        # have their tangents there, and none here.
        with forward_ad._set_fwd_grad_enabled(True):
            if d_bias is not None:
                dims = len(ctx.shape) - 2
                terms.append(d_bias.reshape(-1, *(1,) * dims).expand(ctx.shape))
            total: Tensor = sum(terms[1:], terms[0])
            return total if positive is None else total * (positive > 0)

    def push_gradients(self, ctx: Any, d_dy: Any, dx: Any, d_values: Any) -> tuple[Tensor, ...]:
        """Push tangents, any of which may be None, forward through the backward operator."""
        dy, x, values, pattern = ctx.saved_tensors
        want_x, want_values = ctx.wanted
        totals = [torch.zeros_like(x) if want_x else x.new_empty(0)]
        totals.append(torch.zeros_like(values) if want_values else values.new_empty(0))
        for signal, other_x, other_values in ((d_dy, x, values), (dy, dx, d_values)):
            wanted = want_x and other_values is not None, want_values and other_x is not None
            if signal is None or not any(wanted):
                continue
            other_x = x if other_x is None else other_x
            other_values = values if other_values is None else other_values
            terms = self.gradients(signal, other_x, other_values, pattern, *wanted, *ctx.geometry)
            with forward_ad._set_fwd_grad_enabled(True):  # as in `push`
                for i, term in enumerate(terms):
                    if wanted[i]:
                        totals[i] = totals[i] + term
        return tuple(totals)

    def vmap(self, info: Any, in_dims: Any, x: Tensor, *args: Any) -> Any:
        """Batch the forward operator: where only x is batched, as more examples."""
        if in_dims[0] is None or any(isinstance(d, int) for d in in_dims[1:]):
            return vmap_by_one(self.run, info, in_dims, x, *args)
        x = x.movedim(in_dims[0], 0)
        y = self.run(x.flatten(0, 1), *args)
        return y.unflatten(0, x.shape[:2]), 0

    def __call__(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        block: Tensor,
        out: int,
        relu: bool,
        setting: Any,
    ) -> Tensor:
        """Call the operator by the shortest way that keeps what is at work around it informed."""
        arguments = (x, values, bias, block, out, relu, setting)
        if is_transformed() or is_forward_mode():
            return self.transformed.apply(*arguments)  # type: ignore[no-any-return]
        if needs_operators(x):
            return self.run(*arguments)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return self.direct.apply(*arguments)  # type: ignore[no-any-return]
        return self.forward_cpu(*arguments)


def _direct(self: Bilinear) -> Any:
    """Make the autograd function that needs no operator: PyTorch knows it by its class."""

    class Direct(torch.autograd.Function):
        """The forward operator without the dispatcher, which costs more than a small product."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            y = self.forward_cpu(*inputs)
            self.save(ctx, inputs, y)
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return self.differentiate(ctx, gradients[0])

    return Direct
