"""Jacobians by torch.func, which the library's own are held against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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
    mapped = torch.func.vmap(torch.func.jacrev(one), in_dims=(None, *[0] * len(args)))
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return mapped(parameters, *args)


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
        flat = rows.reshape(*rows.shape[:2], -1)
        kept = mask[name].flatten() if mask and wrt == "kept" and name in mask else slice(None)
        parts.append(flat[:, :, kept])
    return torch.cat(parts, 2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def by_autograd(module: nn.Module, x: Any) -> Tensor:
    """The Jacobian (N, K, P), one example and one output after the other."""
    examples = x if isinstance(x, tuple) else (x,)
    parameters = list(module.parameters())
    found = []
    for i in range(len(examples[0])):
        outputs = module(*(e[i : i + 1] for e in examples)).flatten()
        rows = []
        for f in outputs:
            grads = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(parameters, grads, strict=True)
                    ]
                )
            )
        found.append(torch.stack(rows))
    return torch.stack(found)
