"""How far apart two functions, two displacements or two kernels are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from jacpot.tickets.similarity import alignment

__all__ = ["agreement", "angle", "distance", "kernel_change", "norm"]


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of examples to which two functions give the same class.

    Parameters
    ----------
    first, second
        Outputs ``(N, K)``.
    """
    return float((first.argmax(1) == second.argmax(1)).double().mean())


def distance(first: Tensor, second: Tensor) -> float:
    """Root-mean-square over examples of the Euclidean distance of two functions' outputs.

    Parameters
    ----------
    first, second
        Outputs ``(N, K)``.
    """
    return float((first.double() - second.double()).square().sum(1).mean().sqrt())


def norm(vector: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all parameters, accumulated in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in vector.values()))


def angle(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Angle in degrees between two displacements of the parameters, 0 to 180.

    Two random directions of a large space are at 90 degrees.

    Parameters
    ----------
    first, second
        Displacements by parameter name; what one of them does not name is zero there.
    """
    product = sum(
        float((part.double() * second[name].double()).sum())
        for name, part in first.items()
        if name in second
    )
    cosine = product / max(norm(first) * norm(second), torch.finfo(torch.float64).tiny)
    return float(torch.rad2deg(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1).acos()))


def kernel_change(before: Tensor, after: Tensor) -> float:
    """One minus the centred kernel alignment of two kernels on the same examples.

    0 means equal up to a factor, and 1 means unrelated (Cortes, Mohri and Rostamizadeh 2012,
    eq. 6; Kornblith et al. 2019 call it linear CKA). NaN where centring leaves nothing of a kernel,
    as of a single example.

    Parameters
    ----------
    before, after
        Symmetric ``(N, N)``.
    """
    return 1 - alignment(before.double(), after.double())
