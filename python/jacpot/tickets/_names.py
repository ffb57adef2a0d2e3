"""Parameter names that stay the same whether or not a module is parametrized."""

from __future__ import annotations

import re

from torch import Tensor, nn

__all__ = ["canonical_name", "named_parameters", "owners"]

_ORIGINAL = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")


def canonical_name(name: str) -> str:
    """``fc.parametrizations.weight.original`` -> ``fc.weight``; other names as they are."""
    return _ORIGINAL.sub(r"\1\2", name)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, in the order of the module tree, each once."""
    return {canonical_name(name): parameter for name, parameter in module.named_parameters()}


def owners(module: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every (submodule, attribute) that holds this very parameter: more than one if it is tied."""
    return [
        (child, name)
        for child in module.modules()
        for name, held in child._parameters.items()
        if held is parameter
    ]
