"""Per-example Jacobians, the tangent kernel, and the linearized network."""
