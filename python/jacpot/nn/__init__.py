"""Layers whose weights are masked or sparse."""

from jacpot.nn.masked import MaskedConv2d, MaskedLinear
from jacpot.nn.sparse import SparseConv2d, SparseLinear
from jacpot.nn.sparsify import sparsify

__all__ = ["MaskedConv2d", "MaskedLinear", "SparseConv2d", "SparseLinear", "sparsify"]
