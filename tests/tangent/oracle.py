"""Jacobians by torch.func, which the library's own are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rows_by_name(
    module: nn.Module, x: Any, mask: Mapping[str, Tensor] | None = None, output: Any = None
) -> dict[str, Tensor]:
    """Rows (N, K, *parameter) of every parameter, at the masked parameters."""
    parameters = {
        name: p.detach() * mask[name] if mask and name in mask else p.detach()
        for name, p in module.named_parameters()
    }
    many = isinstance(x, tuple)

    def one(p: dict[str, Tensor], *example: Tensor) -> Tensor:
        batch = tuple(e.unsqueeze(0) for e in example)
        result = torch.func.functional_call(module, p, batch)
        return (result if output is None else output(result)).flatten()

    args = x if many else (x,)
    return torch.func.vmap(torch.func.jacrev(one), in_dims=(None, *[0] * len(args)))(
        parameters, *args
    )


def dense(
    module: nn.Module,
    x: Any,
    mask: Mapping[str, Tensor] | None = None,
    wrt: str = "kept",
    output: Any = None,
) -> Tensor:
    """The Jacobian (N, K, P), columns in the order of named_parameters()."""
    parts = []
    for name, rows in rows_by_name(module, x, mask, output).items():
        flat = rows.flatten(2)
        kept = mask[name].flatten() if mask and wrt == "kept" and name in mask else slice(None)
        parts.append(flat[:, :, kept])
    return torch.cat(parts, 2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
