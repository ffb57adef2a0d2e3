"""Linear operators and the solver for them."""
