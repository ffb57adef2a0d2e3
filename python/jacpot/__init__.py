"""Jacobians and lottery tickets for PyTorch: sparse products, tangent kernels, tangent solvers."""

from jacpot import nn, tickets
from jacpot._backend import build_info, release_memory
from jacpot.linalg import Solution, solve
from jacpot.ops.masked_matmul import masked_matmul
from jacpot.ops.pattern import Pattern
from jacpot.tangent import Jacobian, jacobian, ntk, register_layer_rule
from jacpot.tangent.gauss_newton import gauss_newton
from jacpot.tangent.linearize import LinearizedModule, linearize
from jacpot.tickets import Mask

__all__ = [
    "Jacobian",
    "LinearizedModule",
    "Mask",
    "Pattern",
    "Solution",
    "build_info",
    "gauss_newton",
    "jacobian",
    "linearize",
    "masked_matmul",
    "nn",
    "ntk",
    "register_layer_rule",
    "release_memory",
    "solve",
    "tickets",
]
