"""Embeddings of large vocabularies: what they take follows the examples, not the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import dense, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jacpot
from jacpot.ops.jacobian import Added, Lookup, Rows
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


def check(j, rows):
    """Hold all that a Jacobian gives against its rows (N, K, P)."""
    assert relative_error(j.dense(), rows) < 1e-12
    n, k, p = rows.shape
    v, u = torch.randn(p, 2).double(), torch.randn(n, k, 3).double()
    torch.testing.assert_close(j @ v, rows @ v)
    torch.testing.assert_close(j.T @ u, torch.einsum("nkp,nkr->pr", rows, u))
    shapes = {"full": "nkp,mlp->nkml", "diagonal": "nkp,mkp->nmk", "trace": "nkp,mkp->nm"}
    for outputs, equation in shapes.items():
        torch.testing.assert_close(j.gram(outputs=outputs), torch.einsum(equation, rows, rows))
    torch.testing.assert_close(j.row_norms(), rows.norm(dim=2))
    torch.testing.assert_close(j.column_norms(), rows.flatten(0, 1).norm(dim=0))
    plain = Jacobian(j.outputs, [Rows(rows)], j._columns)
    torch.testing.assert_close(j.sketch(7), plain.sketch(7))
    mixed = j.to_operator().mixed(torch.eye(k).double().expand(n, k, k) * 2)
    torch.testing.assert_close(mixed @ v, 2 * (rows @ v).flatten(0, 1))


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_masked(kept):
    torch.manual_seed(0)
    net, x = Tokens(11, 3).double(), torch.randint(11, (6, 5))
    masks = [torch.rand(11, 3) < kept, torch.rand(11, 3) < 0.5]
    masks[0][2, 1] = True
    j, other = (jacpot.jacobian(net, x, mask={"table.weight": mask}) for mask in masks)
    table = next(block for block in j.blocks if isinstance(block, Lookup))
    assert table.n_parameters == masks[0].sum()
    check(j, dense(net, x, {"table.weight": masks[0]}))
    check_between(net, x, "table.weight", masks, [j, other])
    parts = jacpot.jacobian(net, x, mask={"table.weight": masks[0]}, memory_budget=1)
    torch.testing.assert_close(parts.dense(), j.dense())


def check_between(net, x, name, masks, jacobians):
    """Of Jacobians under two masks the parameters count that both keep."""
    full = [dense(net, x, {name: mask}, wrt="all") for mask in masks]
    for rows, mask in zip(full, masks, strict=True):
        rows[:, :, : mask.numel()] *= mask.flatten()
    expected = torch.einsum("nkp,mlp->nkml", *full)
    torch.testing.assert_close(jacobians[0].gram(jacobians[1]), expected)


class Tied(nn.Module):
    """Scores by the table that embedded the tokens."""

    def __init__(self, vocabulary: int, width: int, written: str = "layer"):
        super().__init__()
        self.table, self.hidden = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight, self.written = self.table.weight, written

    def forward(self, x):
        h, weight = self.hidden(self.table(x)).tanh(), self.table.weight
        ways = {
            "layer": lambda: self.head(h),
            "function": lambda: F.linear(h, weight),
            "product": lambda: h @ weight.T,
            "transposed": lambda: torch.matmul(h, weight.transpose(0, 1)),
        }
        return ways[self.written]().logsumexp(2).mean(1, keepdim=True)


@pytest.mark.parametrize("written", ["layer", "function", "product", "transposed"])
@pytest.mark.parametrize("kept", [None, 0.3])
def test_tied(written, kept):
    torch.manual_seed(0)
    net, x = Tied(31, 6, written).double(), torch.randint(31, (6, 3))
    mask = None if kept is None else {"table.weight": torch.rand(31, 6) < kept}
    j = jacpot.jacobian(net, x, mask=mask)
    assert isinstance(j.blocks[0], Added) == (kept is None)  # few columns take less room
    check(j, dense(net, x, mask))
    parts = jacpot.jacobian(net, x, mask=mask, memory_budget=1)
    torch.testing.assert_close(parts.dense(), j.dense())
    shorter = jacpot.jacobian(net, x[:, :2], mask=mask)
    expected = torch.einsum("nkp,mlp->nkml", j.dense(), shorter.dense())
    torch.testing.assert_close(j.gram(shorter), expected)
    assert jacpot.linearize(net, mask).fit(x, torch.randn(6, 1).double(), ridge=0.1).converged


def test_tied_under_two_masks():
    torch.manual_seed(0)
    net, x = Tied(31, 6).double(), torch.randint(31, (6, 2))
    masks = [torch.rand(31, 6) < 0.9 for _ in range(2)]
    jacobians = [jacpot.jacobian(net, x, mask={"table.weight": mask}) for mask in masks]
    assert all(isinstance(j.blocks[0], Added) for j in jacobians)
    check(jacobians[0], dense(net, x, {"table.weight": masks[0]}))
    check_between(net, x, "table.weight", masks, jacobians)


def test_memory_of_tied():
    vocabulary, width, n, t = 20_000, 64, 4, 4
    torch.manual_seed(0)
    net, x = Tied(vocabulary, width), torch.randint(vocabulary, (n, t))
    jacpot.jacobian(net, x)
    with Largest() as seen:
        j = jacpot.jacobian(net, x)
        j.T @ (j @ torch.randn(j.n_parameters))
    assert seen.elements < 1.1 * j.n_parameters  # rows have four times that
