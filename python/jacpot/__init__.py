"""Jacobians and lottery tickets for PyTorch: sparse products, tangent kernels, tangent solvers."""

from jacpot import tickets
from jacpot._backend import build_info
from jacpot.linalg import Solution, solve
from jacpot.ops.masked_matmul import masked_matmul
from jacpot.ops.pattern import Pattern
from jacpot.tickets import Mask

__all__ = ["Mask", "Pattern", "Solution", "build_info", "masked_matmul", "solve", "tickets"]
