"""Masks, pruning and the search for lottery tickets."""

from jacpot.ops.subset_sum import SubsetSum, subset_sum
from jacpot.tickets import score
from jacpot.tickets.barrier import Barrier, barrier, stability
from jacpot.tickets.elastic import elastic
from jacpot.tickets.imp import imp
from jacpot.tickets.mask import Mask
from jacpot.tickets.multigraph import MultigraphLinear, multigraph, powers_of_two
from jacpot.tickets.overlap import Overlap, overlap, sign_agreement
from jacpot.tickets.parametrization import applied, applied_mask, apply, bake, remove
from jacpot.tickets.planted import Planted, plant
from jacpot.tickets.prune import Scope, prune, prune_iteratively, schedule
from jacpot.tickets.report import PathReport, inspect
from jacpot.tickets.rounds import Round, Tickets
from jacpot.tickets.sanity import random_mask, reinitialise, sanity_checks
from jacpot.tickets.similarity import KernelSimilarity, TangentFit, kernel_similarity, tangent_fits
from jacpot.tickets.sparsify import sparsify
from jacpot.tickets.strong import Approximation, approximate
from jacpot.tickets.supermask import Supermask, criterion, rebuild, supermask

__all__ = [
    "Approximation",
    "Barrier",
    "KernelSimilarity",
    "Mask",
    "MultigraphLinear",
    "Overlap",
    "PathReport",
    "Planted",
    "Round",
    "Scope",
    "SubsetSum",
    "Supermask",
    "TangentFit",
    "Tickets",
    "applied",
    "applied_mask",
    "apply",
    "approximate",
    "bake",
    "barrier",
    "criterion",
    "elastic",
    "imp",
    "inspect",
    "kernel_similarity",
    "multigraph",
    "overlap",
    "plant",
    "powers_of_two",
    "prune",
    "prune_iteratively",
    "random_mask",
    "rebuild",
    "reinitialise",
    "remove",
    "sanity_checks",
    "schedule",
    "score",
    "sign_agreement",
    "sparsify",
    "stability",
    "subset_sum",
    "supermask",
    "tangent_fits",
]
