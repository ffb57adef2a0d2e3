"""Jacobians and lottery tickets for PyTorch: sparse products, tangent kernels, tangent solvers."""

from jacpot._backend import build_info

__all__ = ["build_info"]
