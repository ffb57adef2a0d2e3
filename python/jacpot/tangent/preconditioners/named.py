"""The preconditioners of a tangent fit by name."""

from __future__ import annotations

from typing import Any

from jacpot.linalg.prepare import NAMED as GENERAL
from jacpot.tangent.preconditioners.auto import Auto
from jacpot.tangent.preconditioners.kronecker import Kronecker
from jacpot.tangent.preconditioners.trace_kernel import TraceKernel

__all__ = ["named"]

NAMED = {**GENERAL, "auto": Auto(), "trace": TraceKernel(), "kronecker": Kronecker()}


def named(preconditioner: Any) -> Any:
    """Look up a preconditioner by its name; anything else is returned as it is."""
    if not isinstance(preconditioner, str):
        return preconditioner
    if preconditioner not in NAMED:
        raise ValueError(
            f"argument 'preconditioner' must be one of {sorted(NAMED)}, got {preconditioner!r}"
        )
    return NAMED[preconditioner]
