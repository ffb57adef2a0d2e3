"""Linear operators and solvers that say honestly what they reached."""

from jacpot.linalg.conversion import as_operator
from jacpot.linalg.operator import DenseOperator, FunctionOperator, LinearOperator
from jacpot.linalg.path import solve_path
from jacpot.linalg.solution import Interrupted, Solution, SolverError, Status
from jacpot.linalg.solve import solve

__all__ = [
    "DenseOperator",
    "FunctionOperator",
    "Interrupted",
    "LinearOperator",
    "Solution",
    "SolverError",
    "Status",
    "as_operator",
    "solve",
    "solve_path",
]
