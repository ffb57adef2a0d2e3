"""Embeddings of large vocabularies: what they take follows the examples, not the vocabulary."""

from __future__ import annotations

import pytest
import torch
from oracle import dense
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jacpot
from jacpot.ops.jacobian import Lookup, Rows
from jacpot.tangent.factored import Jacobian


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in _tensors(result)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def _tensors(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel()]


class Tokens(nn.Module):
    """A network on tokens: embeddings, a layer at each position, and the mean's scores."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.hidden(self.table(x)).tanh().mean(1))


def test_memory():
    vocabulary, width, n, t = 50_000, 4, 16, 64
    torch.manual_seed(0)
    net, x = Tokens(vocabulary, width), torch.randint(vocabulary, (n, t))
    with Largest() as seen:
        j = jacpot.jacobian(net, x)
        kernel = j.gram()
        u = torch.randn(n, 2)
        v = j.T @ u
        forward = j @ v
        j.row_norms(), j.column_norms(), jacpot.ntk(net, x, x[:3])
    assert any(isinstance(block, Lookup) for block in j.blocks)
    assert seen.elements < 3 * j.n_parameters  # one-hot vectors would be 190 times that
    expected = torch.einsum("nkml,ml->nk", kernel, u)
    torch.testing.assert_close(forward, expected, rtol=1e-4, atol=1e-4 * float(kernel.abs().max()))


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_parts_and_fit(budget):
    torch.manual_seed(0)
    net, x = Tokens(11, 3).double(), torch.randint(11, (6, 5))
    whole = jacpot.jacobian(net, x)
    parts = jacpot.jacobian(net, x, memory_budget=budget)
    torch.testing.assert_close(parts.dense(), whole.dense())
    y = torch.randn(6, 2, dtype=torch.float64)
    linearized = jacpot.linearize(net)
    assert linearized.fit(x, y, ridge=0.1).converged
    rows = whole.dense().flatten(0, 1)
    residual = (y - net(x).detach()).flatten()
    kernel = rows @ rows.T + 0.1 * torch.eye(len(rows), dtype=torch.float64)
    expected = rows.T @ torch.linalg.solve(kernel, residual)
    found = whole.flatten(linearized.delta)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_examples_of_other_lengths():
    """Two Jacobians of one network at sequences of different lengths are one kernel's sides."""
    torch.manual_seed(0)
    net = Tokens(11, 3).double()
    a, b = (
        jacpot.jacobian(net, torch.randint(11, (4, 5))),
        jacpot.jacobian(net, torch.randint(11, (3, 7))),
    )
    expected = torch.einsum("nkp,mlp->nkml", a.dense(), b.dense())
    torch.testing.assert_close(a.gram(b), expected)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_masked(kept):
    torch.manual_seed(0)
    net, x = Tokens(11, 3).double(), torch.randint(11, (6, 5))
    masks = [torch.rand(11, 3) < kept, torch.rand(11, 3) < 0.5]
    masks[0][2, 1] = True
    j, other = (jacpot.jacobian(net, x, mask={"table.weight": mask}) for mask in masks)
    rows = dense(net, x, {"table.weight": masks[0]})
    table = next(block for block in j.blocks if isinstance(block, Lookup))
    assert table.n_parameters == masks[0].sum()
    torch.testing.assert_close(j.dense(), rows)
    v, u = torch.randn(j.n_parameters, 2).double(), torch.randn(6, 2, 3).double()
    torch.testing.assert_close(j @ v, rows @ v)
    torch.testing.assert_close(j.T @ u, torch.einsum("nkp,nkr->pr", rows, u))
    for outputs, equation in [("full", "nkp,mlp->nkml"), ("diagonal", "nkp,mkp->nmk")]:
        torch.testing.assert_close(j.gram(outputs=outputs), torch.einsum(equation, rows, rows))
    torch.testing.assert_close(j.row_norms(), rows.norm(dim=2))
    torch.testing.assert_close(j.column_norms(), rows.flatten(0, 1).norm(dim=0))
    torch.testing.assert_close(j.sketch(7), _as_rows(j).sketch(7))
    # another mask at another point: what both keep counts
    here, there = (net, x, masks[0]), (net, x, masks[1])
    full = [dense(n, x, {"table.weight": m}, wrt="all") for n, x, m in (here, there)]
    for rows_, mask in zip(full, masks, strict=True):
        rows_[:, :, :33] *= mask.flatten()
    torch.testing.assert_close(j.gram(other), torch.einsum("nkp,mlp->nkml", *full))
    parts = jacpot.jacobian(net, x, mask={"table.weight": masks[0]}, memory_budget=1)
    torch.testing.assert_close(parts.dense(), rows)


def _as_rows(j):
    return Jacobian(j.outputs, [Rows(j.dense())], j._columns)
