"""Which functions have a rule that says how their parameters' Jacobian follows from signals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jacpot.tangent.rules.terms import Term

__all__ = ["RULES", "LayerRule", "register_layer_rule"]

RuleFunction = Callable[..., Mapping[str, Term]]


@dataclass(frozen=True)
class LayerRule:
    """A rule with what the capture has to know of it; see :func:`register_layer_rule`."""

    function: RuleFunction
    signature: inspect.Signature
    parameters: tuple[str, ...]
    when: Callable[..., bool] | None
    integer_input: bool

    @property
    def signals(self) -> str:
        """Name of the rule's first argument."""
        return next(iter(self.signature.parameters))


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
        Functions that networks call, such as ``torch.nn.functional.linear``.
    parameters
        The rule's arguments that may be parameters of a network.
    when
        Given the same arguments as the layer, tells whether the rule holds for them. Where it does
        not, the parameters' rows are found as those of a layer without rule.
    integer_input
        Whether the layer's first argument holds integers.

    Returns
    -------
    callable
        A decorator. The rule it takes is called as ``rule(signals, *args, **kwargs)`` with
        ``signals`` (M, K, ...), the derivatives of the K outputs by what the layer gave, and with
        the arguments of the layer's call, the leading axis of the first one counting the M
        instances. It returns a term for each of its ``parameters`` by the argument's name:
        `Outer`, `Summed` or `Rows`.

    Examples
    --------
    A low-rank layer, whose two weights are used in one function:

    >>> import torch, jacpot
    >>> from torch import Tensor
    >>> from jacpot.tangent.rules import Outer
    >>> def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    ...     if torch.overrides.has_torch_function_variadic(x, down, up):
    ...         return torch.overrides.handle_torch_function(low_rank, (x, down, up), x, down, up)
    ...     return x @ down.T @ up.T
    >>> @jacpot.register_layer_rule(low_rank, parameters=("down", "up"))
    ... def rule(signals, x, down, up):  # signals (M, K, O), x (M, I)
    ...     signals = signals[:, :, None, None]  # one position, one group
    ...     return {
    ...         "down": Outer(x[:, None, None], signals @ up),
    ...         "up": Outer((x @ down.T)[:, None, None], signals),
    ...     }
    >>> class LowRank(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.down, self.up = (torch.nn.Parameter(torch.ones(s)) for s in [(1, 3), (2, 1)])
    ...     def forward(self, x):
    ...         return low_rank(x, self.down, self.up)
    >>> jacpot.jacobian(LowRank(), torch.ones(4, 3)).blocks[0].shape  # groups, outputs, inputs
    (1, 1, 3)
    """

    def decorate(function: RuleFunction) -> RuleFunction:
        rule = LayerRule(function, inspect.signature(function), parameters, when, integer_input)
        for layer in layers:
            RULES[layer] = rule
        return function

    return decorate
