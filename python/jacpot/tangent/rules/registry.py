"""Which functions have a rule that says how their parameters' Jacobian follows from signals."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from jacpot.tangent.rules.terms import Term

__all__ = ["RULES", "LayerRule", "register_layer_rule"]

RuleFunction = Callable[..., Mapping[str, Term]]


@dataclass(frozen=True)
class LayerRule:
    """A rule with what the capture has to know of it; see :func:`register_layer_rule`.

    Attributes
    ----------
    function, signature
        The rule, called with the signals and the arguments of the layer.
    signals, input
        Names of its arguments for the signals and for what the layer sees.
    parameters
        Names of its arguments that may be parameters of a network; of a module rule none are.
    local
        Whether it is made for a single call, whose arguments it takes as they were.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.rules import RULES
    >>> rule = RULES[torch.nn.functional.linear]
    >>> rule.input, rule.parameters
    ('input', ('weight', 'bias'))
    """

    function: RuleFunction
    signature: inspect.Signature
    signals: str
    input: str
    parameters: tuple[str, ...]
    when: Callable[..., bool] | None
    integer_input: bool
    local: bool = False

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """What arguments without a name are called, but the signals."""
        parameters = self.signature.parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]

    @functools.cached_property
    def _needed(self) -> int:
        """How many of these a call has to have, and no others."""
        parameters = list(self.signature.parameters.values())[1:]
        needed = [p.name for p in parameters if p.default is p.empty and p.name not in self._names]
        many = len(self._names) + 1  # more than there are: never
        return many if needed else sum(p.default is p.empty for p in parameters)

    def bound(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Give a call's arguments by the rule's names; None for one with others."""
        if not kwargs and self._needed <= len(args) <= len(self._names):  # most often
            return dict(zip(self._names, args, strict=False))
        try:
            arguments = dict(self.signature.bind(None, *args, **kwargs).arguments)
        except TypeError:
            return None
        del arguments[self.signals]
        return arguments


RULES: dict[Any, LayerRule] = {}


def register_layer_rule(
    *layers: Any,
    parameters: tuple[str, ...] = ("weight", "bias"),
    when: Callable[..., bool] | None = None,
    integer_input: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Say how the Jacobian of a layer's parameters follows from the signals at its output.

    Parameters
    ----------
    *layers
        Module classes, or functions that networks call with their parameters, such as
        ``torch.nn.functional.linear``.
    parameters
        The arguments of a function that may be parameters of a network.
    when
        Given the same arguments as the layer, tells whether the rule holds for them. Where it does
        not, the parameters' rows are found as those of a layer without rule.
    integer_input
        Whether the layer sees integers.

    Returns
    -------
    callable
        A decorator. The rule that it takes is called as ``rule(signals, *args, **kwargs)`` for a
        function and as ``rule(signals, module, *args, **kwargs)`` for a module class, with
        ``signals`` (M, K, ...), the derivatives of the K outputs by what the layer gave, and with
        the arguments of the layer's call; the leading axis of the first that is no parameter
        counts the M instances. It returns a term for each parameter, by its name in the function
        or the module: `Outer`, `Summed` or `Rows`.

    Raises
    ------
    TypeError
        If a layer is neither a class of modules nor callable, or the rule has no argument for what
        the layer sees.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.tangent.rules import Outer
    >>> class LowRank(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.down = torch.nn.Parameter(torch.randn(2, 8))
    ...         self.up = torch.nn.Parameter(torch.randn(5, 2))
    ...     def forward(self, x):
    ...         return x @ self.down.T @ self.up.T
    >>> @jacpot.register_layer_rule(LowRank)
    ... def low_rank(signals, layer, x):  # signals (M, K, 5), x (M, 8)
    ...     x, signals = x[:, None, None], signals[:, :, None, None]  # one position, one group
    ...     return {
    ...         "down": Outer(activations=x, signals=signals @ layer.up),
    ...         "up": Outer(activations=x @ layer.down.T, signals=signals),
    ...     }
    >>> J = jacpot.jacobian(LowRank(), torch.randn(3, 8))
    >>> [block.shape for block in J.blocks]  # groups, outputs, inputs
    [(1, 2, 8), (1, 5, 2)]
    """

    def decorate(function: RuleFunction) -> RuleFunction:
        signature = inspect.signature(function)
        signals, *names = signature.parameters
        for layer in layers:
            if not callable(layer):
                raise TypeError(
                    f"argument 'layers' must be module classes or functions, got {layer!r}"
                )
            own = () if is_module_class(layer) else parameters
            seen = [name for name in names[is_module_class(layer) :] if name not in own]
            if not seen:
                raise TypeError(f"the rule {function.__name__} takes nothing that a layer sees")
            RULES[layer] = LayerRule(
                function, signature, signals, seen[0], own, when, integer_input
            )
        return function

    return decorate


def is_module_class(layer: Any) -> bool:
    """Whether this is a class of modules."""
    return isinstance(layer, type) and issubclass(layer, nn.Module)
