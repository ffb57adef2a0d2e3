"""What solvers ask of their arguments."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from jacpot.ops.arrays import as_tensor

__all__ = ["FLOATS", "check_count", "check_limits", "check_number", "float_tensor"]

FLOATS = (torch.float32, torch.float64)


def check_number(name: str, value: Any, *, zero: bool = True) -> float:
    """Refuse what is not a finite number of at least zero, or above zero."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"argument {name!r} must be a number, got {type(value).__name__}") from None
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        least = "at least 0" if zero else "positive"
        raise ValueError(f"argument {name!r} must be finite and {least}, got {number}")
    return number


def check_count(name: str, value: Any, least: int = 0) -> int:
    """Refuse what is not an integer, or a smaller one."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"argument {name!r} must be an int, got {type(value).__name__}") from None
    if count < least:
        raise ValueError(f"argument {name!r} must be at least {least}, got {count}")
    return count


def check_limits(tol: Any, max_iter: Any) -> None:
    """Refuse a tolerance or an iteration limit that cannot be one."""
    check_number("tol", tol, zero=False)
    if max_iter is not None:
        check_count("max_iter", max_iter)


def float_tensor(name: str, array: Any) -> Tensor:
    """Take a tensor, NumPy or CuPy array of a float dtype, without a copy where possible."""
    tensor = as_tensor(name, array)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"argument {name!r} must be float32 or float64, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"argument {name!r} must be on the CPU or a CUDA device, got {tensor.device}"
        )
    return tensor.detach()
