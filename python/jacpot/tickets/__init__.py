"""Masks, pruning and the search for lottery tickets."""

from jacpot.tickets import score
from jacpot.tickets.mask import Mask
from jacpot.tickets.parametrization import applied, applied_mask, apply, bake, remove
from jacpot.tickets.prune import prune, prune_iteratively, schedule

__all__ = [
    "Mask",
    "applied",
    "applied_mask",
    "apply",
    "bake",
    "prune",
    "prune_iteratively",
    "remove",
    "schedule",
    "score",
]
