"""Preconditioners as objects: settings first, prepared for an operator by the solver."""

from jacpot.linalg.preconditioners.base import Identity, Preconditioner, Prepared
from jacpot.linalg.preconditioners.cholesky import Cholesky
from jacpot.linalg.preconditioners.diagonal import Diagonal
from jacpot.linalg.preconditioners.nystrom import Nystrom
from jacpot.linalg.preconditioners.partial_cholesky import PartialCholesky

__all__ = [
    "Cholesky",
    "Diagonal",
    "Identity",
    "Nystrom",
    "PartialCholesky",
    "Preconditioner",
    "Prepared",
]
