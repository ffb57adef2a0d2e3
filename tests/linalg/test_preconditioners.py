"""Every preconditioner: symmetric positive definite, no harm to the answer, fewer iterations."""

from __future__ import annotations

import pytest
import torch

import jacpot
from jacpot.linalg import DenseOperator, Status
from jacpot.linalg.preconditioners import Diagonal, Identity, Nystrom, PartialCholesky
from jacpot.linalg.preconditioners.partial_cholesky import random_pivoted_cholesky
from jacpot.linalg.scaling import power_of_two, power_of_two_above

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


def badly_scaled(rows, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (a * torch.logspace(0, 4, columns, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("damping", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["diagonal", "inverse", "operator"])
def test_least_squares_take_a_preconditioner_of_the_normal_equations(damping, dtype, kind):
    a = badly_scaled(120, 40, dtype)
    b = torch.randn(120, 2, generator=torch.Generator().manual_seed(4), dtype=dtype)
    wide = a.double()
    normal = wide.T @ wide + damping * torch.eye(40, dtype=torch.float64)
    inverse = torch.linalg.inv(normal)
    helper = {
        "diagonal": "diagonal",
        "inverse": lambda v: inverse.to(v.dtype) @ v,
        "operator": DenseOperator(inverse),
    }[kind]
    options = {"damping": damping, "method": "lsmr", "tol": 1e-9}
    plain = jacpot.solve(a, b, **options)
    helped = jacpot.solve(a, b, preconditioner=helper, **options).raise_if_failed()
    assert helped.iterations < plain.iterations / 4
    pulled = wide.T @ (b.double() - wide @ helped.x) - damping * helped.x
    assert pulled.norm() <= 2e-9 * torch.linalg.matrix_norm(wide, 2) * b.double().norm()
    expected = torch.linalg.solve(normal, wide.T @ b.double())
    torch.testing.assert_close(helped.x, expected, rtol=1e-5, atol=1e-8)


def test_a_shifted_system_takes_one_of_its_own_normal_equations():
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    b = torch.randn(60, generator=generator, dtype=torch.float64)
    shifted = a + 0.5 * torch.eye(60, dtype=torch.float64)
    inverse = torch.linalg.inv(shifted.T @ shifted)
    options = {"damping": 0.5, "method": "lsmr", "tol": 1e-9}
    helped = jacpot.solve(a, b, preconditioner=lambda v: inverse @ v, **options).raise_if_failed()
    assert helped.iterations <= 5
    assert (b - shifted @ helped.x).norm() <= 1.01e-9 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minres_takes_a_positive_definite_preconditioner(dtype):
    generator = torch.Generator().manual_seed(6)
    basis = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, 3, 80, dtype=torch.float64)
    values[::3] *= -1
    a = (basis * values @ basis.T).to(dtype)
    a = (a + a.T) / 2
    b = torch.randn(80, 2, generator=generator, dtype=dtype)
    inverse = basis / values.abs() @ basis.T
    plain = jacpot.solve(a, b, method="minres", tol=1e-9)
    helped = jacpot.solve(
        a, b, method="minres", tol=1e-9, preconditioner=lambda v: inverse.to(v.dtype) @ v
    ).raise_if_failed()
    assert helped.iterations < plain.iterations / 3
    residual = b.double() - a.double() @ helped.x
    assert (residual.norm(dim=0) <= 1.01e-9 * b.double().norm(dim=0)).all()


@pytest.mark.parametrize("method", ["cg", "block_cg", "minres", "lsmr"])
def test_a_preconditioner_that_is_not_positive_definite_is_named(method):
    a, b = kernel(30), torch.ones(30, 1, dtype=torch.float64)
    solution = jacpot.solve(a, b, 0.1, method=method, preconditioner=lambda v: -v)
    assert solution.status is Status.preconditioner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_of_columns_are_those_of_numbers(dtype):
    sizes = [0.0, 1.0, -3.0, 2.0**-140, 5e-324, 1e300, torch.inf, torch.nan, 0.75, 8.0]
    columns = torch.tensor([sizes, [0.0] * len(sizes)], dtype=torch.float64).to(dtype)
    expected = [power_of_two_above(size) for size in columns.abs()[0].tolist()]
    assert power_of_two(columns).tolist() == expected
    assert power_of_two(columns[:0]).tolist() == [1.0] * len(sizes)
