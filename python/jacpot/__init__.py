"""Jacobians and lottery tickets for PyTorch: sparse products, tangent kernels, tangent solvers."""

from jacpot import tickets
from jacpot._backend import build_info
from jacpot.linalg import Solution, solve
from jacpot.tickets import Mask

__all__ = ["Mask", "Solution", "build_info", "solve", "tickets"]
