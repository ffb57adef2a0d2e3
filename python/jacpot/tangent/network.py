"""A module as a function of its examples and parameters, left exactly as it was found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Inputs",
    "Network",
    "Output",
    "n_examples",
    "over_tensors",
    "recording",
    "take",
    "tensors",
]

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
Output: TypeAlias = str | int | Callable[..., Tensor]

_DROPOUT = nn.modules.dropout._DropoutNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def tensors(x: Any) -> list[Tensor]:
    """All tensors in ``x``, a tensor or a sequence or mapping of them."""
    found: list[Tensor] = []
    over_tensors(x, found.append)
    return found


def over_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the tensors in ``x``; what is none stays."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: over_tensors(value, function) for key, value in x.items()}
    return tuple(over_tensors(v, function) for v in x) if isinstance(x, tuple | list) else x


def n_examples(x: Inputs, name: str = "x") -> int:
    """Count the examples: the size of the leading axis, which all tensors share.

    Raises
    ------
    TypeError
        If it is no tensor and holds none.
    ValueError
        If the leading axes differ or there is none.
    """
    if not isinstance(x, Tensor | Mapping | Sequence) or isinstance(x, str):
        raise TypeError(
            f"argument {name!r} must be a torch.Tensor, or a sequence or mapping of them for a "
            f"module of several inputs, got {type(x).__name__}"
        )
    found = tensors(x)
    if not found:
        raise TypeError(f"argument {name!r} must hold at least one torch.Tensor, got {x!r}")
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in found}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"argument {name!r} must hold tensors with one leading axis of examples, got shapes "
            f"{[tuple(tensor.shape) for tensor in found]}"
        )
    return found[0].shape[0]


def take(x: Any, index: slice | Tensor) -> Any:
    """Give some of the examples, in the form of ``x``, as constants."""

    def part(tensor: Tensor) -> Tensor:
        # a tensor made in inference mode is of no use outside it, but its copy is
        return (tensor.clone() if tensor.is_inference() else tensor.detach())[index]

    return over_tensors(x, part)


class Network:
    """A module at fixed parameters, as a function of examples: ``(N, K)`` outputs.

    Parameters
    ----------
    module
        The network. Neither it nor its tensors are ever written to.
    mask
        Bool tensors by parameter name; the network is evaluated at the masked parameters.
    output
        Which part of what the module gives: a key, an index, or a function of it (and of the
        targets, if there are any).

    Attributes
    ----------
    parameters
        By name those that require gradients, masked and detached: the columns of the Jacobian.
    state
        By name all parameters, masked and detached, and copies of the buffers.

    Raises
    ------
    TypeError, ValueError
        If the module has nothing to differentiate, depends on its whole batch or on chance, or
        the mask does not fit it.
    """

    def __init__(
        self,
        module: nn.Module,
        mask: Mapping[str, Tensor] | None = None,
        output: Output | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"argument 'module' must be a torch.nn.Module, got {type(module).__name__}"
            )
        refuse_batch_dependence(module)
        self.module, self.output = module, output
        every = dict(module.named_parameters())
        self.mask = checked_mask(module, mask)
        self.parameters: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        for name, parameter in every.items():
            value = parameter.detach()
            if name in self.mask:
                value = value * self.mask[name]
            self.state[name] = value
            if parameter.requires_grad:
                self.parameters[name] = value
        if not self.parameters:
            raise ValueError(
                "argument 'module' must have at least one parameter that requires gradients, got "
                + ("only frozen ones" if every else "a module without parameters")
            )
        dtypes = {(value.dtype, value.device) for value in self.parameters.values()}
        self.dtype, self.device = next(iter(dtypes))
        if len(dtypes) != 1 or self.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                "the parameters of argument 'module' must all be float32 or all be float64 on one "
                f"device, got {sorted(map(str, dtypes))}"
            )

    def __call__(
        self, x: Inputs, targets: Any = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Evaluate: ``(N, ...)`` examples -> ``(N, K)``.

        Gradients are recorded whatever the caller's mode, and autocast is off.
        """
        args = (x,) if isinstance(x, Tensor) else () if isinstance(x, Mapping) else tuple(x)
        kwargs = dict(x) if isinstance(x, Mapping) else {}
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        state = {**buffers, **self.state, **(parameters or {})}
        result = torch.func.functional_call(self.module, state, args, kwargs)
        if callable(self.output):
            result = self.output(result) if targets is None else self.output(result, targets)
        elif self.output is not None:
            result = result[self.output]
        if not isinstance(result, Tensor):
            raise TypeError(
                "argument 'module' must give a torch.Tensor, got "
                f"{type(result).__name__}; choose a part of it with output=, a key, an index or a "
                "function"
            )
        if not result.is_floating_point():
            raise TypeError(f"the module's output must be floating point, got {result.dtype}")
        n = n_examples(x)
        if result.ndim == 0 or result.shape[0] != n:
            raise ValueError(
                f"the module's output must have a leading axis of {n} examples like its input, got "
                f"shape {tuple(result.shape)}"
            )
        return result.reshape(n, result.shape[1:].numel())


# A network is evaluated with other tensors in the place of its parameters, and seen by what they
# are: two threads that do so to one module, or to modules that share layers, would see each other.
_one_at_a_time = threading.RLock()


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients, without autocast, whatever modes the caller is in; one thread at a time."""
    with _one_at_a_time, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # the one attention whose derivatives take a batch of cotangents
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def checked_mask(module: nn.Module, mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check a mask against the module; tied parameters go by their first name.

    Raises
    ------
    TypeError
        If it is no mapping of bool tensors.
    ValueError
        If it names no parameter of the module, or has another shape.
    """
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        raise TypeError(
            "argument 'mask' must be a mapping from parameter names to bool tensors, got "
            f"{type(mask).__name__}"
        )
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = dict(module.named_parameters(remove_duplicate=False))
    checked: dict[str, Tensor] = {}
    for name, kept in mask.items():
        if name not in every:
            raise ValueError(
                f"argument 'mask' must name parameters of the module, got {name!r}; it has "
                f"{', '.join(map(repr, every)) or 'none'}"
            )
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(f"argument 'mask' must hold bool tensors, got {got} for {name!r}")
        if kept.shape != every[name].shape:
            raise ValueError(
                f"argument 'mask' must have the parameter's shape {tuple(every[name].shape)} for "
                f"{name!r}, got {tuple(kept.shape)}"
            )
        primary = first[id(every[name])]
        kept = kept.to(every[name].device)
        checked[primary] = kept & checked[primary] if primary in checked else kept
    return checked


def refuse_batch_dependence(module: nn.Module) -> None:
    """Refuse layers whose output for an example depends on the others, or on chance.

    Raises
    ------
    ValueError
        With the layer's name and the cure.
    """
    for name, layer in module.named_modules():
        where = f"layer {name!r} ({type(layer).__name__})" if name else type(layer).__name__
        if isinstance(layer, _BATCH_NORM) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"{where} normalises by the statistics of its batch, so outputs have no Jacobian "
                "of their own per example: "
                + (
                    "call module.eval() first"
                    if layer.running_mean is not None
                    else "it needs running statistics (track_running_stats=True) and module.eval()"
                )
            )
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(f"{where} writes to its weight when it is called: set max_norm=None")
        p = getattr(layer, "dropout", 0.0) if not isinstance(layer, _DROPOUT) else layer.p
        if layer.training and isinstance(p, float) and p > 0:
            raise ValueError(f"{where} drops out at random (p={p}): call module.eval() first")
