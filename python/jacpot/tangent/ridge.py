"""The choice of a fit's ridge by what it predicts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jacpot.linalg.arguments import check_number
from jacpot.tangent.fit import validation_error
from jacpot.tangent.problem import Problem
from jacpot.tangent.spectrum import Spectrum, least

__all__ = ["choose_ridge"]


def choose_ridge(
    problem: Problem,
    criterion: str,
    ridges: Sequence[float] | None,
    validation: tuple[Tensor, Tensor] | None,
) -> float:
    """Choose the ridge of a fit with the squared loss.

    Parameters
    ----------
    problem
        The fit, whatever its ridge.
    criterion
        ``"gcv"``, ``"loo"``, ``"evidence"`` or ``"validation"``.
    ridges
        Candidates; by default a grid over the kernel's spectrum.
    validation
        ``(x, y)``, for ``"validation"``.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the loss is another, or an argument is missing or out of range.
    """
    if problem.loss != "mse":
        raise ValueError("argument 'ridge' must be a number for losses other than 'mse'")
    if problem.residual.numel() == 0:
        raise ValueError("argument 'ridge' must be a number where there are no examples or outputs")
    spectrum = Spectrum(problem.jacobian, problem.residual.reshape(-1))
    if criterion in ("gcv", "loo", "evidence"):
        return spectrum.best(criterion, ridges, problem.jacobian.n_outputs)
    if criterion != "validation":
        raise ValueError(
            "argument 'ridge' must be a number, 'gcv', 'loo', 'evidence' or 'validation', "
            f"got {criterion!r}"
        )
    if validation is None:
        raise ValueError("argument 'validation' must be (x, y) for ridge='validation'")
    candidates = spectrum.grid().tolist() if ridges is None else ridges
    checked = [check_number("ridges", ridge) for ridge in candidates]
    return least("ridges", checked, validation_error(problem, spectrum.dual, *validation))
