"""Preconditioners that know the structure of a tangent kernel or of its Gauss-Newton matrix."""

from jacpot.tangent.preconditioners.auto import Auto
from jacpot.tangent.preconditioners.kronecker import Kronecker
from jacpot.tangent.preconditioners.trace_kernel import TraceKernel

__all__ = ["Auto", "Kronecker", "TraceKernel"]
