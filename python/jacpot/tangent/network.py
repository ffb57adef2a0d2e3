"""A module as a function of its examples and parameters, left exactly as it was found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacpot.nn.stand_ins import call_with, constant
from jacpot.nn.worn import check_module, merged_mask, plain_parameters

__all__ = [
    "Inputs",
    "Network",
    "Output",
    "arguments",
    "check_network",
    "n_examples",
    "one_at_a_time",
    "over_tensors",
    "part_of",
    "plain_attention",
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
    if isinstance(x, Tensor):
        return [x]
    found: list[Tensor] = []
    over_tensors(x, found.append)
    return found


def over_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the tensors in ``x``; what is none stays."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, (tuple, list)):
        return tuple([over_tensors(v, function) for v in x])
    if isinstance(x, Mapping):
        return {key: over_tensors(value, function) for key, value in x.items()}
    return x


def n_examples(x: Inputs, name: str = "x") -> int:
    """Count the examples: the size of the leading axis, which all tensors share.

    Raises
    ------
    TypeError
        If it is no tensor and holds none.
    ValueError
        If the leading axes differ or there is none.
    """
    arguments(x, name)
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
        return constant(tensor)[index]

    return over_tensors(x, part)


def arguments(x: Inputs, name: str = "x") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments to call a module of one or several inputs with.

    Raises
    ------
    TypeError
        If it is neither a tensor nor a sequence or mapping.
    """
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, Mapping):
        return (), dict(x)
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(x), {}
    raise TypeError(
        f"argument {name!r} must be a torch.Tensor, or a sequence or mapping of them for a "
        f"module of several inputs, got {type(x).__name__}"
    )


def part_of(result: Any, output: Output | None, targets: Any = None) -> Tensor:
    """Give the part of what a module gave that ``output`` names.

    Raises
    ------
    TypeError
        If that is no tensor.
    """
    if callable(output):
        result = output(result) if targets is None else output(result, targets)
    elif output is not None:
        result = result[output]
    if not isinstance(result, Tensor):
        raise TypeError(
            "argument 'module' must give a torch.Tensor, got "
            f"{type(result).__name__}; choose a part of it with output=, a key, an index or a "
            "function"
        )
    return result


class Network:
    """A module at fixed parameters, as a function of examples: ``(N, K)`` outputs.

    Parameters
    ----------
    module
        The network. Neither it nor its tensors are ever written to.
    mask
        Bool tensors by parameter name; the network is evaluated at the masked parameters. A module
        that wears a mask is its plain network with that mask, and this one may only refine it.
    output
        Which part of what the module gives: a key, an index, or a function of it (and of the
        targets, if there are any).

    Attributes
    ----------
    parameters
        By name those that require gradients, masked and detached: the columns of the Jacobian.
    state
        By name all parameters, masked and detached.
    output_shape
        Shape of one example's output, from when the network is first called.

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
        check_network(module)
        self.module, self.output = module, output
        self._eagerly: Callable[[], AbstractContextManager[Any]] = nullcontext
        if any(is_compiled(layer) for layer in module.modules()):
            self._eagerly = partial(torch.compiler.set_stance, "force_eager")
        self.output_shape = torch.Size()
        self.mask = merged_mask(module, mask)
        self.parameters: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self._own_names: dict[str, str] = {}
        every = plain_parameters(module)
        for name, (own_name, parameter) in every.items():
            self._own_names[name] = own_name
            value = constant(parameter)
            if name in self.mask:
                value = torch.where(self.mask[name], value, 0)
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
        values = {**self.state, **(parameters or {})}
        own = {self._own_names[name]: value for name, value in values.items()}
        with self._eagerly():  # what is compiled shows none of the functions that it calls
            result = call_with(self.module, own, *arguments(x))
        result = part_of(result, self.output, targets)
        if not result.is_floating_point():
            raise TypeError(f"the module's output must be floating point, got {result.dtype}")
        n = n_examples(x)
        if result.ndim == 0 or result.shape[0] != n:
            raise ValueError(
                f"the module's output must have a leading axis of {n} examples like its input, got "
                f"shape {tuple(result.shape)}"
            )
        self.output_shape = result.shape[1:]
        return result.reshape(n, self.output_shape.numel())


# A network is evaluated with other tensors in the place of its parameters, and seen by what they
# are: two threads that do so to one module, or to modules that share layers, would see each other.
one_at_a_time = threading.RLock()
_recorders = [False]  # for each entrance into the lock whether it records


@contextmanager
def plain_attention() -> Iterator[None]:
    """Take the one attention that has a forward mode and derivatives by a batch of cotangents."""
    fused = torch.backends.mha.get_fastpath_enabled()  # whole layers, where nothing is recorded
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients, without autocast, whatever modes the caller is in; one thread at a time."""
    with one_at_a_time, ExitStack() as stack:
        plain = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if plain and _recorders[-1]:  # as it is left, unless a network changed the mode
            yield
            return
        _recorders.append(True)
        stack.callback(_recorders.pop)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(plain_attention())
        stack.enter_context(
            disable_saved_tensors_hooks(
                "argument 'module' must keep what its derivatives need, but something in it, such "
                "as torch.utils.checkpoint, uses saved_tensors_hooks: switch that off, factors "
                "need no second pass through the network"
            )
        )
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_no_reentrant_checkpoints())
        yield


@contextmanager
def _no_reentrant_checkpoints() -> Iterator[None]:
    """Say what to do where torch refuses derivatives through what runs anew on the way back."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "argument 'module' must keep what its derivatives need, but something in it uses "
            "torch.utils.checkpoint with use_reentrant=True: switch that off, factors need no "
            "second pass through the network"
        ) from error


def check_network(module: nn.Module) -> None:
    """Refuse a module that has no Jacobian, or whose examples have none of their own.

    Raises
    ------
    TypeError
        If it is no module.
    ValueError
        With the layer's name and the cure.
    """
    check_module(module)
    _refuse_wrappers(module)
    _refuse_batch_dependence(module)


def _refuse_wrappers(module: nn.Module) -> None:
    """Refuse what runs copies of the module it holds, or something made of its code."""
    for name, layer in module.named_modules():
        kind, where = type(layer).__name__, f" (at {name!r})" if name else ""
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"argument 'module' must be no {kind}{where}, which runs copies of the network: "
                "give the network itself, its .module"
            )
        if layer is module and isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"argument 'module' must be no {kind}, whose parameters cannot be replaced: "
                "give the module that it was made from"
            )


def is_compiled(layer: nn.Module) -> bool:
    """Whether calls of this go through `torch.compile`."""
    return "_orig_mod" in layer._modules or layer._compiled_call_impl is not None


def _refuse_batch_dependence(module: nn.Module) -> None:
    """Refuse layers whose output for an example depends on the others, or on chance."""
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
