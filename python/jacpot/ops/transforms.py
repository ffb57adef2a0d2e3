"""How operators meet PyTorch's transforms: `torch.func`, forward mode, vmap, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_forward_mode", "is_transformed", "needs_operators", "transformed", "vmap_by_one"]

_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def is_transformed() -> bool:
    """Whether `torch.func` is at work, which takes functions but not operators all the way."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether tensors may carry tangents, which operators drop."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def needs_operators(x: Tensor) -> bool:
    """Whether somebody listens to the dispatcher: a graph, a tracer, a transform, a device."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or x.is_neg()  # the sign of the memory, which the dispatcher applies
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        # Autograd pulls many gradients back at once (``is_grads_batched``).
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def vmap_by_one(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """Batch an operator by calling it for each entry in turn."""
    results = []
    for i in range(info.batch_size):
        pick = [
            a.select(d, i).contiguous() if isinstance(d, int) else a
            for a, d in zip(args, in_dims, strict=True)
        ]
        results.append(operator(*pick))
    if isinstance(results[0], tuple):
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(results), 0


def transformed(
    run: Callable[..., Any],
    save: Callable[..., None],
    kept: Callable[[tuple[Any, ...], Any], tuple[Tensor | None, ...]],
    pull: Callable[..., Any],
    push: Callable[..., Any],
) -> Any:
    """Make an operator's autograd function for `torch.func` and forward mode, which it lacks.

    Parameters
    ----------
    run
        The operator.
    save
        Called with ``(ctx, inputs, output)``: keeps what ``pull`` needs.
    kept
        From inputs and output to the tensors that ``push`` needs.
    pull, push
        Called with ``ctx`` and gradients or tangents.
    """

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            with torch.no_grad():
                return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)
            ctx.save_for_forward(*kept(inputs, output))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return pull(ctx, *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return push(ctx, *tangents)

    return Transformed
