"""Recording of a network's calls of the functions that have a layer rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, peek_interpreter_stack
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from jacpot.nn.worn import Masked
from jacpot.ops.convolution_layer import conv2d
from jacpot.ops.linear_layer import linear
from jacpot.ops.max_pool import max_pool2d
from jacpot.ops.normalisation_layer import batch_norm
from jacpot.ops.relu import relu
from jacpot.ops.transforms import is_forward_mode
from jacpot.tangent.network import Inputs, Network, tensors
from jacpot.tangent.rules import RULES, LayerRule
from jacpot.tangent.rules.recurrent import unrolled

__all__ = ["Call", "OwnDerivatives", "Recorder"]


class OwnDerivatives(RuntimeError):
    """The network takes derivatives itself: then its weights have uses that no call shows."""


@dataclass(frozen=True, eq=False)
class Call:
    """A recorded call of a function that has a rule.

    Attributes
    ----------
    rule
        The function's rule.
    arguments
        The call's arguments by the rule's names for them.
    parameters
        Names of the network's parameters by argument.
    edge
        Where the call's result entered the graph; unlike the result itself it stays what it is
        when a later operation writes into the result.
    shape
        The result's shape.
    version
        How often what the call took had been written to.
    """

    rule: LayerRule
    arguments: dict[str, Any]
    parameters: dict[str, str]
    edge: GradientEdge | None
    shape: torch.Size
    version: int

    @property
    def input(self) -> Tensor:
        """What the layer saw."""
        tensor: Tensor = self.arguments[self.rule.input]
        return tensor

    @property
    def layer(self) -> str:
        """The layer that owns the parameters, for messages."""
        return next(iter(self.parameters.values())).rpartition(".")[0] or "of the module itself"


class Recorder(TorchFunctionMode):
    """Records, while active, the calls that have a rule and take parameters of the network.

    Parameters
    ----------
    network
        The network that will be called.
    parameters
        The tensors it will be called with, by name; calls are recorded for these.
    taps
        For each call to come a tensor of zeros to add to its result. By default a call's place in
        the graph is kept instead, which a function that is mapped over examples has no way to give.
    faster
        Whether to call our own functions for some of torch's, which only `torch.func.vmap` batches.
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, Tensor],
        taps: Sequence[Tensor] | None = None,
        faster: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.taps, self.faster = network, taps, faster
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.calls: list[Call] = []
        self._inside_module = False

    def run(
        self, x: Inputs, targets: Any = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Evaluate the network ``(N, ...) -> (N, K)``, and record.

        Parameters
        ----------
        x, targets
            The examples.
        parameters
            Tensors by name to put in the place of the network's.

        Raises
        ------
        RuntimeError
            If the network writes to what a layer has read.
        """
        # A module with a forward of its own is not what the rule of its class is for.
        modules: list[Any] = list(self.network.module.modules())
        overridden = [m for m in modules if type(m) in RULES and "forward" not in vars(m)]
        for module in overridden:  # in the instance, until the end of this run
            module.forward = partial(self._forward, RULES[type(module)], module)
        # The parameters are masked already; layers then see them as they are.
        masks: list[Any] = [module for module in modules if type(module) is Masked]
        for module in masks:
            module.forward = _same
        try:
            with self:
                outputs = self.network(x, targets, parameters)
        finally:
            for module in (*overridden, *masks):
                del module.forward
        for call in self.calls:
            if self.taps is None and _version(call.arguments) != call.version:
                raise RuntimeError(
                    f"the input of layer {call.layer!r} was written to after the layer had read "
                    "it; make that operation out of place (inplace=False, x = x + y instead of "
                    "x += y)"
                )
        return outputs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        derives = func in DERIVATIVES or (self.taps is None and _is_transformed())
        if derives and self.names:
            raise OwnDerivatives
        if self._inside_module:
            return self._evaluate(func, args, kwargs)
        if func in MATRIX_PRODUCTS and len(args) == 2 and not kwargs:
            weight = self._transposed(args[1])
            if weight is not None:
                with self:
                    return F.linear(args[0], weight)
        parts = _transparent(func) if func in COMPOSITES else unrolled(func, args)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None:
            return self._evaluate(func, args, kwargs)
        arguments = rule.bound(*args, **kwargs)
        if arguments is None:
            return self._evaluate(func, args, kwargs)
        parameters = {
            argument: name
            for argument in rule.parameters
            if (name := self._named(arguments.get(argument))) is not None
        }
        if not self._applies(rule, arguments, parameters):
            return self._evaluate(func, args, kwargs)
        # The graph does not lead to parameters where a rule holds: an edge to one is then a use
        # of it that no rule covers, and no gradient of a weight is ever computed.
        ruled = {id(arguments[a]): self._fixed(name) for a, name in parameters.items()}
        result = self._evaluate(
            func,
            [ruled.get(id(value), value) for value in args],
            {key: ruled.get(id(value), value) for key, value in kwargs.items()},
        )
        return self._record(rule, arguments, parameters, result)

    def _transposed(self, value: Any) -> Tensor | None:
        """The parameter of which this is the transpose: ``x @ W.T`` is what a linear layer does."""
        weight = value._base if isinstance(value, Tensor) and value.ndim == 2 else None
        if weight is None or id(weight) not in self.names or weight.shape != value.shape[::-1]:
            return None
        turned = weight.stride() == value.stride()[::-1]
        return weight if turned and value.storage_offset() == weight.storage_offset() else None

    def _named(self, value: Any) -> str | None:
        """The name of a parameter; None for what is none."""
        return self.names.get(id(value))

    def _fixed(self, name: str) -> Tensor:
        """A parameter's value, from which the graph leads nowhere."""
        return self.network.parameters[name]

    def _evaluate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return (FASTER.get(func, func) if self.faster else func)(*args, **kwargs)

    def _forward(self, rule: LayerRule, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a module that has a rule of its own."""
        forward = type(module).forward
        parameters = {
            name: self.names[id(value)]
            for name, value in module._parameters.items()
            if id(value) in self.names
        }
        fixed = copy.copy(module)  # the same module with parameters that the graph does not reach
        del fixed.forward
        vars(fixed)["_parameters"] = {
            name: self.network.parameters[parameters[name]] if name in parameters else value
            for name, value in module._parameters.items()
        }
        arguments = rule.bound(fixed, *args, **kwargs)
        if arguments is None or not self._applies(rule, arguments, parameters):
            return forward(module, *args, **kwargs)
        self._inside_module = True
        try:
            result = forward(fixed, *args, **kwargs)
        finally:
            self._inside_module = False
        return self._record(rule, arguments, parameters, result)

    def _applies(
        self, rule: LayerRule, arguments: dict[str, Any], parameters: Mapping[str, str]
    ) -> bool:
        """Whether the rule holds for this call, which has parameters of the network."""
        seen = arguments[rule.input]
        if not parameters or id(seen) in self.names:
            return False
        others = [arguments.get(name) for name in rule.parameters if name not in parameters]
        if any(map(_changes, others)):  # a weight that is made of parameters
            return False
        if rule.when is not None and not rule.when(**arguments):
            return False
        if not rule.integer_input and seen.dtype != self.network.dtype:
            layer = next(iter(parameters.values())).rpartition(".")[0]
            raise TypeError(
                f"argument 'x' must lead to {self.network.dtype} inputs of layer {layer!r} like "
                f"its parameters, got {seen.dtype}"
            )
        return True

    def _record(
        self,
        rule: LayerRule,
        arguments: dict[str, Any],
        parameters: dict[str, str],
        result: Tensor,
    ) -> Tensor:
        shape, version = result.shape, 0
        if self.taps is not None:
            result = result + self.taps[len(self.calls)]
        else:
            version = _version(arguments)
            if not result.requires_grad:  # no leaf may come out: the network may write to it
                seen = arguments[rule.input]
                result = result.requires_grad_().clone() if rule.local else _entrance(result, seen)
        edge = get_gradient_edge(result) if result.requires_grad else None
        self.calls.append(Call(rule, arguments, parameters, edge, shape, version))
        return result


def _entrance(result: Tensor, seen: Tensor) -> Tensor:
    """Have derivatives end at what a layer gave, in the same memory unless it holds more."""
    leaf = result.requires_grad_()
    shared = result.untyped_storage().data_ptr() == seen.untyped_storage().data_ptr()
    if shared or not result.is_contiguous() or is_forward_mode():
        return leaf.clone()
    return _Entrance.apply(leaf)  # type: ignore[no-any-return, no-untyped-call]


class _Entrance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, signals: Tensor) -> Tensor:
        return signals


def _same(x: Tensor) -> Tensor:
    return x


def _version(arguments: Mapping[str, Any]) -> int:
    return sum(tensor._version for tensor in tensors([*arguments.values()]))


def _changes(value: Any) -> bool:
    """Whether derivatives are taken by this, or it is one of many that are mapped over."""
    return isinstance(value, Tensor) and (value.requires_grad or is_batchedtensor(value))


# What computes the same as a function of torch, sooner.
FASTER: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    F.conv2d: conv2d,
    F.linear: linear,
    F.max_pool2d: max_pool2d,
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
}

# Products of examples and a weight (I, O).
MATRIX_PRODUCTS: frozenset[Any] = frozenset(
    [torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm]
)

# Functions of torch that are made of others, some of which have a rule.
COMPOSITES: frozenset[Any] = frozenset([F.multi_head_attention_forward])


DERIVATIVES: frozenset[Any] = frozenset(
    [torch.autograd.grad, torch.autograd.backward, Tensor.backward]
)


def _is_transformed() -> bool:
    """Whether this runs inside a transform of `torch.func`."""
    return peek_interpreter_stack() is not None


@cache
def _transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function with its insides in sight of a mode, which torch hides from it."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    seen = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    seen.__kwdefaults__ = function.__kwdefaults__
    return seen
