"""Layer rules, one file a family: how a parameter's Jacobian follows from the signals."""

from jacpot.tangent.rules import convolution, embedding, linear, normalisation, sparse
from jacpot.tangent.rules.registry import RULES, LayerRule, register_layer_rule
from jacpot.tangent.rules.terms import LookedUp, Outer, Rows, Summed, Term

__all__ = [
    "RULES",
    "LayerRule",
    "LookedUp",
    "Outer",
    "Rows",
    "Summed",
    "Term",
    "convolution",
    "embedding",
    "linear",
    "normalisation",
    "register_layer_rule",
    "sparse",
]
