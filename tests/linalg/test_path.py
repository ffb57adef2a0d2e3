"""A path of dampings is the solutions one by one."""

from __future__ import annotations

import numpy
import pytest
import torch

from jacpot.linalg import solve_path


def kernel(size, dtype):
    points = torch.rand(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.exp(-torch.cdist(points, points)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dampings", [[0.5], [10.0, 1e-3, 0.1], numpy.logspace(-4, 1, 12).tolist()])
def test_path_is_the_solutions(dtype, count, dampings):
    a = kernel(150, dtype)
    b = torch.randn(150, count, dtype=dtype) * 1e5
    for damping, solution in zip(dampings, solve_path(a, b, dampings, tol=1e-9), strict=True):
        assert solution.converged, str(solution)
        residual = b.double() - a.double() @ solution.x - damping * solution.x
        assert (residual.norm(dim=0) <= 1.001e-9 * b.double().norm(dim=0)).all()


def test_dependent_zero_and_flat_right_hand_sides():
    a = kernel(40, torch.float64)
    b = torch.randn(40, 1, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.0])
    for solution in solve_path(a, b, [0.1, 1.0]):
        assert solution.converged
        torch.testing.assert_close(solution.x[:, 1], 2 * solution.x[:, 0])
    assert solve_path(a.numpy(), b[:, 0].numpy(), [0.3])[0].x.shape == (40,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_easy_dampings_share_a_krylov_space_and_hard_ones_go_on(dtype):
    a = kernel(400, dtype)
    b = torch.randn(400, 3, dtype=dtype) @ torch.tensor([[1.0, 2.0, 0.0], [0, 0, 0], [0, 0, 1]]).to(
        dtype
    )
    dampings = [100.0, 1e-4, 30.0]
    solutions = solve_path(a, b, dampings, tol=1e-9)
    assert [s.method for s in solutions] == ["block lanczos", "cg path", "block lanczos"]
    exact = [
        torch.linalg.solve(a.double() + damping * torch.eye(400), b.double())
        for damping in dampings
    ]
    for solution, x in zip(solutions, exact, strict=True):
        assert solution.converged, str(solution)
        torch.testing.assert_close(solution.x, x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_functions_are_solved_one_by_one():
    a, b = kernel(40, torch.float64), torch.randn(40, dtype=torch.float64)
    for one, two in zip(
        solve_path(lambda v: a @ v, b, [0.1, 1.0]), solve_path(a, b, [0.1, 1.0]), strict=True
    ):
        torch.testing.assert_close(one.x, two.x, rtol=1e-4, atol=1e-5)


def test_indefinite_matrices_are_not_called_solved():
    assert not solve_path(torch.diag(torch.tensor([1.0, -2.0])), torch.ones(2), [2.0])[0].converged


@pytest.mark.parametrize("dampings", [[0.0], [-1.0], [float("inf")]])
def test_dampings_must_be_positive(dampings):
    with pytest.raises(ValueError, match="dampings"):
        solve_path(torch.eye(2), torch.ones(2), dampings)
    assert solve_path(torch.eye(2), torch.ones(2), []) == []


def test_matrices_that_are_not_symmetric():
    a, b = torch.randn(20, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    for damping, solution in zip([0.5, 2.0], solve_path(a, b, [0.5, 2.0], tol=1e-9), strict=True):
        assert solution.converged
        assert (b - a @ solution.x - damping * solution.x).norm() <= 1.01e-9 * b.norm()


@pytest.mark.parametrize(
    ("operator", "rhs", "words"),
    [
        (torch.ones(3, 2), torch.ones(3), "'operator' must be a square matrix, got shape"),
        (torch.eye(3), torch.ones(4), "'rhs' must have shape"),
        (torch.eye(3), torch.ones(3, 1, 1), "'rhs' must have shape"),
        (torch.eye(3), torch.tensor([1.0, torch.nan, 1.0]), "'rhs' must be finite"),
    ],
)
def test_refusals(operator, rhs, words):
    with pytest.raises(ValueError, match=words):
        solve_path(operator, rhs, [1.0])
