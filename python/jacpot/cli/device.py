"""The option that says where to compute."""

from __future__ import annotations

__all__ = ["usable"]


def usable(name: str) -> str:
    """Give a device's name back, or raise `ValueError` with the reason why it cannot be used."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {error}") from error
    return name
