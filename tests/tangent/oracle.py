"""Jacobians by torch.func and torch.autograd, which the library's own are held against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacpot
from jacpot.ops.jacobian import Rows, sketch


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
            grads = (
                torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True)
                if f.requires_grad
                else [torch.zeros_like(p) for p in parameters]
            )
            rows.append(torch.cat([g.flatten() for g in grads]))
        found.append(torch.stack(rows))
    return torch.stack(found)


EQUATIONS = {"full": "nkp,mlp->nkml", "trace": "nkp,mkp->nm", "diagonal": "nkp,mkp->nmk"}


def check_operations(J: jacpot.Jacobian, rows: Tensor, K: jacpot.Jacobian, others: Tensor) -> None:
    """Hold all that a Jacobian gives against its rows (N, K, P), and against another's.

    Differences are to be below 1e-10 of the largest that a result could be.
    """
    n, k, p = rows.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=rows.dtype)

    def close(found: Tensor, expected: Tensor, scale: float) -> None:
        assert found.shape == expected.shape
        assert found.dtype == rows.dtype
        assert not found.requires_grad
        if found.numel():
            assert float((found - expected).abs().max()) <= 1e-10 * scale

    largest = [float(r.abs().max()) if r.numel() else 0.0 for r in (rows, others)]
    size, scale = max(largest) + 1e-6, max(p, 1)
    assert J.shape == (n * k, p)
    close(J.dense(), rows, size)
    for tail in ((), (2,)):
        v, u = normal(p, *tail), normal(n, k, *tail)
        close(J @ v, rows @ v, size * scale)
        close(J.T @ u, torch.einsum("nkp,nk...->p...", rows, u), size * max(1, n * k))
    v = normal(p)
    close(J @ J.unflatten(v), rows @ v, size * scale)
    close(torch.from_numpy(J.to_scipy() @ v.numpy()), (rows @ v).flatten(), size * scale)
    assert torch.equal(J.flatten(J.unflatten(v)), v)
    assert torch.equal(J.from_blocks(J.to_blocks(v)), v)
    for outputs, equation in EQUATIONS.items():
        own, cross = J.gram(outputs=outputs), J.gram(K, outputs=outputs)
        close(own, torch.einsum(equation, rows, rows), size**2 * scale)
        close(cross, torch.einsum(equation, rows, others), size**2 * scale)
    close(J.row_norms(), rows.norm(dim=2), size * scale)
    close(J.column_norms(), rows.norm(dim=(0, 1)), size * max(1, n * k))
    identity = [Rows(torch.eye(p, dtype=rows.dtype)[:, None])]
    for kind in ("rademacher", "sparse"):
        matrix = sketch(identity, 9, 5, kind=kind)[:, 0]
        close(J.sketch(9, 5, kind), rows @ matrix, size * scale)
        close(K.sketch(9, 5, kind), others @ matrix, size * scale)
