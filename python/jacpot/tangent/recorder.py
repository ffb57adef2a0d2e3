"""Recording of a network's calls of the functions that have a layer rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from jacpot.tangent.network import Network
from jacpot.tangent.rules import RULES, LayerRule

__all__ = ["Call", "Recorder"]


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
        How often the first argument had been written to.
    """

    rule: LayerRule
    arguments: dict[str, Any]
    parameters: dict[str, str]
    edge: GradientEdge | None
    shape: torch.Size
    version: int

    @property
    def first(self) -> str:
        """Name of the first argument, what the layer sees."""
        return next(iter(self.arguments))

    @property
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.arguments[self.first]
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
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, Tensor],
        taps: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.taps = network, taps
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return _transparent(func)(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        arguments = dict(rule.signature.bind(None, *args, **kwargs).arguments)
        del arguments[rule.signals]
        parameters = {
            argument: self.names[id(arguments[argument])]
            for argument in rule.parameters
            if id(arguments.get(argument)) in self.names
        }
        first = next(iter(arguments.values()))
        if (
            not parameters
            or id(first) in self.names
            or not (rule.when is None or rule.when(**arguments))
        ):
            return func(*args, **kwargs)
        if not rule.integer_input and first.dtype != self.network.dtype:
            layer = next(iter(parameters.values())).rpartition(".")[0]
            raise TypeError(
                f"argument 'x' must lead to {self.network.dtype} inputs of layer {layer!r} like "
                f"its parameters, got {first.dtype}"
            )
        # The graph does not lead to parameters where a rule holds: an edge to one is then a use
        # of it that no rule covers, and no gradient of a weight is ever computed.
        ruled = {id(arguments[a]): self.network.parameters[name] for a, name in parameters.items()}
        result: Tensor = func(
            *(ruled.get(id(value), value) for value in args),
            **{key: ruled.get(id(value), value) for key, value in kwargs.items()},
        )
        shape, version = result.shape, 0
        if self.taps is not None:
            result = result + self.taps[len(self.calls)]
        else:
            version = first._version
            if not result.requires_grad:  # no leaf may come out: the network may write to it
                result = result.requires_grad_().clone()
        edge = get_gradient_edge(result) if result.requires_grad else None
        self.calls.append(Call(rule, arguments, parameters, edge, shape, version))
        return result


# Functions of torch that are made of others, some of which have a rule.
COMPOSITES: frozenset[Any] = frozenset([F.multi_head_attention_forward])


@cache
def _transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function with its insides in sight of a mode, which torch hides from it."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    seen = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    seen.__kwdefaults__ = function.__kwdefaults__
    return seen
