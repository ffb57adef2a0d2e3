"""What solvers take for a preconditioner, made for a system."""

from __future__ import annotations

from typing import Any

import torch

from jacpot.linalg.conversion import as_operator
from jacpot.linalg.operator import LinearOperator
from jacpot.linalg.preconditioners import (
    Diagonal,
    Identity,
    Nystrom,
    PartialCholesky,
    Preconditioner,
    Prepared,
)

__all__ = ["NAMED", "prepare"]

NAMED: dict[str, Preconditioner] = {
    "none": Identity(),
    "diagonal": Diagonal(),
    "nystrom": Nystrom(),
    "partial_cholesky": PartialCholesky(),
}


def prepare(preconditioner: Any, a: LinearOperator, damping: float) -> Prepared:
    """Make what :func:`solve` takes as ``preconditioner`` for ``a + damping·I``."""
    if preconditioner is None:
        return Prepared(None, "none")
    if isinstance(preconditioner, str):
        if preconditioner not in NAMED:
            raise ValueError(
                f"argument 'preconditioner' must be one of {sorted(NAMED)}, got {preconditioner!r}"
            )
        preconditioner = NAMED[preconditioner]
    if isinstance(preconditioner, Prepared):
        return preconditioner
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(a, damping)
    if isinstance(preconditioner, LinearOperator):
        inverse = preconditioner
    elif callable(preconditioner):
        inverse = as_operator(
            preconditioner, torch.empty(a.shape[0], 1, dtype=a.dtype, device=a.device)
        )
    else:
        raise TypeError(
            "argument 'preconditioner' must be None, a name, a Preconditioner, a LinearOperator "
            f"or a function, got {type(preconditioner).__name__}"
        )
    if inverse.shape != a.shape:
        raise ValueError(
            f"argument 'preconditioner' must have shape {a.shape} like the operator, "
            f"got {inverse.shape}"
        )
    return Prepared(inverse, type(preconditioner).__name__)
