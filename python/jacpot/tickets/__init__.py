"""Masks, pruning and the search for lottery tickets."""

from jacpot.tickets import score
from jacpot.tickets.imp import imp
from jacpot.tickets.mask import Mask
from jacpot.tickets.parametrization import applied, applied_mask, apply, bake, remove
from jacpot.tickets.prune import prune, prune_iteratively, schedule
from jacpot.tickets.rounds import Round, Tickets
from jacpot.tickets.sanity import random_mask, reinitialise, sanity_checks
from jacpot.tickets.supermask import Supermask, criterion, rebuild, supermask

__all__ = [
    "Mask",
    "Round",
    "Supermask",
    "Tickets",
    "applied",
    "applied_mask",
    "apply",
    "bake",
    "criterion",
    "imp",
    "prune",
    "prune_iteratively",
    "random_mask",
    "rebuild",
    "reinitialise",
    "remove",
    "sanity_checks",
    "schedule",
    "score",
    "supermask",
]
