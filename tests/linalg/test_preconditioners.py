"""Every preconditioner: symmetric positive definite, no harm to the answer, fewer iterations."""

from __future__ import annotations

import pytest
import torch

import jacpot
from jacpot.linalg import DenseOperator
from jacpot.linalg.preconditioners import Diagonal, Identity, Nystrom, PartialCholesky
from jacpot.linalg.preconditioners.partial_cholesky import random_pivoted_cholesky

TABLE = [Identity(), Diagonal(), Nystrom(rank=80), Nystrom(), PartialCholesky(rank=80, block=10)]


def kernel(size=400, dtype=torch.float64, seed=0):
    points = torch.rand(size, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.exp(-torch.cdist(points, points)).to(dtype)


@pytest.mark.parametrize("preconditioner", TABLE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_is_symmetric_positive_definite(preconditioner, dtype):
    prepared = preconditioner.prepare(DenseOperator(kernel(120, dtype)), 1e-3)
    if prepared.inverse is None:
        assert "none" in prepared.description
        return
    inverse = prepared.inverse.dense().double()
    assert (inverse - inverse.T).norm() <= 1e-4 * inverse.norm()
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0


@pytest.mark.parametrize("preconditioner", [Nystrom(rank=80), PartialCholesky(rank=80, block=10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_saves_iterations(preconditioner, dtype):
    a = kernel(dtype=dtype)
    b = torch.randn(400, 2, dtype=dtype)
    plain = jacpot.solve(a, b, damping=0.1, method="cg").raise_if_failed()
    helped = jacpot.solve(a, b, damping=0.1, method="cg", preconditioner=preconditioner)
    assert helped.converged
    assert helped.iterations < 0.6 * plain.iterations
    assert helped.setup_seconds > 0
    assert "rank=" in helped.preconditioner
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-3, atol=1e-4)


def test_diagonal_undoes_bad_scaling():
    scale = torch.logspace(-4, 4, 400, dtype=torch.float64)
    a = scale[:, None] * (kernel() + torch.eye(400)) * scale
    b = torch.randn(400, dtype=torch.float64)
    options = {"method": "cg", "tol": 1e-8, "max_iter": 4000}
    helped = jacpot.solve(a, b, preconditioner="diagonal", **options)
    plain = jacpot.solve(a, b, **options)
    assert helped.iterations < plain.iterations


@pytest.mark.parametrize("name", ["none", "diagonal", "nystrom", "partial_cholesky"])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_tiny_systems(name, size):
    a = torch.eye(size) * 3
    solution = jacpot.solve(a, torch.ones(size), damping=0.5, method="cg", preconditioner=name)
    assert solution.converged
    torch.testing.assert_close(solution.x, torch.full((size,), 1 / 3.5, dtype=torch.float64))


def test_adaptive_nystrom_gives_up_when_decay_is_slow():
    prepared = Nystrom().prepare(DenseOperator(torch.eye(300)), 1.0)
    assert prepared.inverse is None
    assert "none" in prepared.description


def test_partial_cholesky_is_exact_on_low_rank():
    root = torch.randn(50, 7, dtype=torch.float64)
    factor = random_pivoted_cholesky(DenseOperator(root @ root.T), 30, 4)
    assert factor.shape[1] == 7
    torch.testing.assert_close(factor @ factor.T, root @ root.T)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="preconditioner"):
        jacpot.solve(torch.eye(3), torch.ones(3), preconditioner="magic")
