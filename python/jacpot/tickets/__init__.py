"""Masks, pruning and the search for lottery tickets."""

from jacpot.tickets import score
from jacpot.tickets.imp import imp
from jacpot.tickets.mask import Mask
from jacpot.tickets.parametrization import applied, applied_mask, apply, bake, remove
from jacpot.tickets.prune import prune, prune_iteratively, schedule
from jacpot.tickets.rounds import Round, Tickets

__all__ = [
    "Mask",
    "Round",
    "Tickets",
    "applied",
    "applied_mask",
    "apply",
    "bake",
    "imp",
    "prune",
    "prune_iteratively",
    "remove",
    "schedule",
    "score",
]
