"""Per-example Jacobians, the tangent kernel, and the linearized network."""

from jacpot.tangent.jacobian import Jacobian, jacobian
from jacpot.tangent.ntk import ntk
from jacpot.tangent.rules import register_layer_rule

__all__ = ["Jacobian", "jacobian", "ntk", "register_layer_rule"]
