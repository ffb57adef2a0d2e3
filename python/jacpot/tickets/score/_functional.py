"""The network as a pure function of the scored parameters, for gradients that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import call_with, constant
from jacpot.nn.worn import named_parameters, plain_parameters
from jacpot.tickets.mask import chosen_mask

__all__ = ["Loss", "Transform", "call", "preserved", "refuse_indices", "scored_parameters"]

Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[str, Tensor], Tensor]


def scored_parameters(module: nn.Module, mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The scored parameters at the masked weights: detached, and no views of the parameters."""
    parameters = named_parameters(module)
    return {
        name: torch.where(kept, parameters[name].detach(), 0)
        for name, kept in chosen_mask(module, mask).items()
    }


def call(
    module: nn.Module, x: Tensor, scored: Mapping[str, Tensor], others: Transform | None = None
) -> Tensor:
    """The module's output with ``scored`` in place of its parameters.

    ``others`` maps (name, detached tensor) of what is not scored, buffers included. Buffers are
    always copies, so that running statistics move in the copy.
    """
    _check_tensor(x)
    tensors: dict[str, Tensor] = {}
    for name, (own, parameter) in plain_parameters(module).items():
        tensors[own] = scored[name] if name in scored else _other(name, constant(parameter), others)
    for key, buffer in module.named_buffers():
        tensors[key] = _other(key, buffer.detach().clone(), others)
    output = call_with(module, tensors, (constant(x),))
    if not isinstance(output, Tensor):
        raise TypeError(f"argument 'module' must return one tensor, got {type(output).__name__}")
    return output


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"argument 'x' must be a torch.Tensor, got {type(x).__name__}")


def _other(name: str, tensor: Tensor, others: Transform | None) -> Tensor:
    return tensor if others is None else others(name, tensor)


@contextmanager
def preserved(module: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Random state and training modes afterwards as before; inside, ``training`` if given."""
    modes = {child: child.training for child in module.modules()}
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            if training is not None:
                module.train(training)
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def refuse_indices(module: nn.Module, x: Tensor) -> None:
    """Refuse an input of indices where real numbers are to flow from the input on."""
    _check_tensor(x)
    if not x.is_floating_point() and any(
        isinstance(child, nn.Embedding | nn.EmbeddingBag) for child in module.modules()
    ):
        raise TypeError(
            "argument 'x' holds indices of an embedding, from which nothing flows: give a module "
            f"that takes vectors, as floating-point numbers, got {x.dtype}"
        )
