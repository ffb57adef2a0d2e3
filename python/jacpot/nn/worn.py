"""The masks that a module wears, and its parameters by the names that they have without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jacpot.nn.masked import MaskedConv2d, MaskedLinear

__all__ = [
    "Masked",
    "check_module",
    "check_writable",
    "checked_mask",
    "merged_mask",
    "named_parameters",
    "owners",
    "plain_parameters",
]


class Masked(nn.Module):
    """The parametrization ``weight -> where(mask, weight, 0)``; the mask is a buffer.

    ``where`` and not a product, so that a pruned NaN or infinity is zero too.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with pruned entries at zero."""
        return torch.where(self.mask, weight, 0)


def check_module(module: nn.Module) -> None:
    """Refuse what is no module, or has parameters or buffers without values.

    Raises
    ------
    TypeError
        If it is no module.
    ValueError
        If one is lazy or on the meta device, with the cure.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"argument 'module' must be a torch.nn.Module, got {type(module).__name__}")
    for name, layer in module.named_modules():
        held = [x for x in (*layer._parameters.values(), *layer._buffers.values()) if x is not None]
        which = type(layer).__name__ + (f" (at {name!r})" if name else "")
        if any(map(is_lazy, held)):
            raise ValueError(
                f"argument 'module' must have all its parameters, but those of {which} get their "
                "shape when it is first called: call the module once"
            )
        if any(x.is_meta for x in held):
            raise ValueError(
                f"argument 'module' must have all its values, but those of {which} are on the "
                "meta device, where there are none: give it some, as by "
                "module.to_empty(device='cpu') and load_state_dict"
            )


def _chains(child: nn.Module) -> dict[str, Any]:
    """Parametrizations of one layer that are a mask and nothing else, by attribute."""
    lists: Any = dict(child._modules.items()).get("parametrizations", {})
    return {
        leaf: chain
        for leaf, chain in lists.items()
        if len(chain) == 1 and isinstance(chain[0], Masked)
    }


def plain_parameters(
    module: nn.Module, *, remove_duplicate: bool = True
) -> dict[str, tuple[str, nn.Parameter]]:
    """Parameters by the names, and in the order, that they have without masks; with their own.

    As of `torch.nn.Module.named_parameters`, each once or under each of its names. Raises what
    `check_module` does.
    """
    check_module(module)
    found: dict[str, tuple[str, nn.Parameter]] = {}
    seen = set()
    for prefix, child in module.named_modules(remove_duplicate=False):
        if id(child) in seen:
            continue
        start = f"{prefix}." if prefix else ""
        own = [(leaf, leaf, parameter) for leaf, parameter in child._parameters.items()]
        for leaf, chain in reversed(_chains(child).items()):
            seen.add(id(chain))
            place = getattr(chain, "position", len(own))
            own.insert(place, (leaf, f"parametrizations.{leaf}.original", chain.original))
        for leaf, name, parameter in own:
            if parameter is None or (remove_duplicate and id(parameter) in seen):
                continue
            seen.add(id(parameter))
            found[start + leaf] = start + name, parameter
    return found


def _worn(module: nn.Module) -> dict[int, Tensor]:
    """Masks by the identity of the parameter that each is on."""
    masks: dict[int, Tensor] = {}
    for child in module.modules():
        if isinstance(child, MaskedLinear | MaskedConv2d):
            masks[id(child.weight)] = child.mask
        for chain in _chains(child).values():
            masks[id(chain.original)] = chain[0].mask
    return masks


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without masks, each once."""
    return {name: parameter for name, (_, parameter) in plain_parameters(module).items()}


def check_writable(module: nn.Module) -> None:
    """Refuse to change what was made in inference mode, as PyTorch does outside of that mode.

    Raises
    ------
    ValueError
        With the cure.
    """
    for name, parameter in named_parameters(module).items():
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"argument 'module' must have parameters that can be changed, but {name!r} was "
                "made in inference mode: give copy.deepcopy(module)"
            )


def owners(module: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every (submodule, attribute) that holds this very parameter: more than one if it is tied."""
    return [
        (child, leaf)
        for child in module.modules()
        for leaf, held in child._parameters.items()
        if held is parameter
    ]


def checked_mask(module: nn.Module, mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check a mask against a module's parameters, and put it where they are.

    A shared parameter goes by its first name, whichever of its names the mask uses.

    Raises
    ------
    TypeError
        If it is no mapping of bool tensors.
    ValueError
        If it names no parameter of the module, has another shape, or has two masks for one shared
        parameter.
    """
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        raise TypeError(
            "argument 'mask' must be a mapping from parameter names to bool tensors, got "
            f"{type(mask).__name__}"
        )
    every = plain_parameters(module, remove_duplicate=False)
    first: dict[int, str] = {}
    for name, (_, parameter) in every.items():
        first.setdefault(id(parameter), name)
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
        parameter = every[name][1]
        if kept.shape != parameter.shape:
            raise ValueError(
                f"argument 'mask' must have the parameter's shape {tuple(parameter.shape)} for "
                f"{name!r}, got {tuple(kept.shape)}"
            )
        primary, kept = first[id(parameter)], kept.to(parameter.device)
        if not torch.equal(checked.setdefault(primary, kept), kept):
            raise ValueError(
                f"argument 'mask' must have one mask for {name!r} and {primary!r}, which are one "
                "parameter, got two"
            )
    return checked


def merged_mask(module: nn.Module, mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check a mask, which may refine the one that the module wears, and add what it leaves out.

    Raises
    ------
    TypeError, ValueError
        As `checked_mask`, and if the mask keeps what the one worn prunes.
    """
    merged, worn = checked_mask(module, mask), _worn(module)
    if not worn:
        return merged
    for name, parameter in named_parameters(module).items():
        if id(parameter) not in worn:
            continue
        kept = worn[id(parameter)]
        if name in merged and bool((merged[name] & ~kept).any()):
            raise ValueError(
                f"argument 'mask' must keep no more of {name!r} than the mask that the module "
                "wears; take that off first (jacpot.tickets.remove)"
            )
        merged.setdefault(name, kept.detach().clone())
    return merged
