"""Mask criteria and mask actions: which weights to keep, and what to put in their places.

Zhou et al. 2019, *Deconstructing lottery tickets: zeros, signs, and the supermask*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of
from jacpot.nn.worn import named_parameters
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import chosen_mask
from jacpot.tickets.sanity import reinitialise
from jacpot.tickets.supermask.build import signed_constant

__all__ = ["CRITERIA", "criterion", "rebuild"]

M = TypeVar("M", bound=nn.Module)

# From (initial weight, final weight) to a score; higher stays.
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "large_final": lambda first, last: last.abs(),
    "small_final": lambda first, last: -last.abs(),
    "large_init": lambda first, last: first.abs(),
    "small_init": lambda first, last: -first.abs(),
    "large_init_large_final": lambda first, last: torch.minimum(
        first.abs() / first.std(), last.abs() / last.std()
    ),
    "small_init_small_final": lambda first, last: (
        -torch.maximum(first.abs() / first.std(), last.abs() / last.std())
    ),
    "magnitude_increase": lambda first, last: last.abs() - first.abs(),
    "movement": lambda first, last: (last - first).abs(),
    "large_final_same_sign": lambda first, last: last * first.sign(),
    "random": lambda first, last: torch.rand_like(last),
}


def criterion(
    name: str,
    initial: nn.Module,
    final: nn.Module,
    mask: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores from where weights began and where training took them, for :func:`prune`.

    Parameters
    ----------
    name
        ``"large_final"``, ``"small_final"``, ``"large_init"``, ``"small_init"``,
        ``"large_init_large_final"``, ``"small_init_small_final"``, ``"magnitude_increase"``,
        ``"movement"``, ``"large_final_same_sign"`` (final magnitude, negative if the sign changed)
        or ``"random"``.
    initial, final
        The same network before and after training.
    mask
        Which parameters; by default those of :meth:`jacpot.Mask.ones`.
    seed
        Of ``"random"``.

    Examples
    --------
    >>> import copy, torch
    >>> from jacpot import tickets
    >>> first = torch.nn.Linear(2, 1)
    >>> last = copy.deepcopy(first)
    >>> _ = last.weight.data.add_(1)
    >>> tickets.criterion("movement", first, last)["weight"].round().tolist()
    [[1.0, 1.0]]
    """
    if name not in CRITERIA:
        raise ValueError(f"argument 'name' must be one of {', '.join(CRITERIA)}, got {name!r}")
    chosen = chosen_mask(initial, mask)
    before, after = named_parameters(initial), named_parameters(final)
    with seeded(seed), torch.no_grad():
        return {n: CRITERIA[name](before[n].detach(), after[n].detach()) for n in chosen}


def rebuild(
    initial: M,
    mask: Mapping[str, Tensor],
    kept: Literal["initial", "signed_constant", "reinitialised", "shuffled", "mean"] = "initial",
    pruned: Literal["zero", "initial", "mean"] = "zero",
    seed: int = 0,
) -> M:
    """A copy of a network with new values at kept and at pruned places: Zhou's mask actions.

    Parameters
    ----------
    initial
        The network at its initialisation.
    mask
        What is kept.
    kept
        ``"initial"`` values, ``"signed_constant"`` (signs times the root mean square of the
        parameter), ``"reinitialised"``, the kept initial values ``"shuffled"`` among themselves,
        or their signed ``"mean"`` magnitude.
    pruned
        ``"zero"``, ``"initial"`` (frozen there if the caller masks their gradients), or the
        ``"mean"`` of the parameter's initial values.
    seed
        Of what is drawn.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> mask = {"weight": torch.tensor([[True, False]])}
    >>> tickets.rebuild(layer, mask).weight[0, 1].item()
    0.0
    """
    if kept not in ("initial", "signed_constant", "reinitialised", "shuffled", "mean"):
        raise ValueError(f"argument 'kept' is not a mask-1 action: {kept!r}")
    if pruned not in ("zero", "initial", "mean"):
        raise ValueError(f"argument 'pruned' must be 'zero', 'initial' or 'mean', got {pruned!r}")
    chosen = chosen_mask(initial, mask)
    result = copy_of(initial)
    parameters = named_parameters(result)
    fresh = named_parameters(reinitialise(initial, seed)) if kept == "reinitialised" else {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, on in chosen.items():
            weight = parameters[name]
            on = on.to(weight.device)
            values = weight.clone()
            if kept == "signed_constant":
                values = signed_constant(weight)
            elif kept == "mean":
                values = weight.sign() * (weight[on].abs().mean() if on.any() else 0)
            elif kept == "reinitialised":
                values = fresh[name].detach()
            elif kept == "shuffled":
                order = torch.randperm(int(on.sum()), generator=generator, device="cpu")
                values[on] = weight[on][order]
            others = {"zero": 0.0, "initial": weight, "mean": weight.mean()}[pruned]
            weight.copy_(torch.where(on, values, torch.as_tensor(others).to(weight)))
    return result
