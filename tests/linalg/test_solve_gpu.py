"""`solve` for tensors on a GPU: every method, against the solution in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot.linalg import Status

METHODS = ["auto", "cg", "block_cg", "cholesky", "lsmr"]


def system(n, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n + 3, generator=generator, dtype=torch.float64)
    b = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    return (root @ root.T / n + torch.eye(n)).to(dtype), b.to(dtype)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=6)
@given(
    n=st.integers(1, 40),
    columns=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 50),
)
def test_solutions_are_those_of_float64(gpu, method, n, columns, dtype, seed):
    a, b = system(n, columns, dtype, seed)
    solution = jacpot.solve(a.to(gpu), b.to(gpu), method=method, tol=1e-9)
    assert solution.converged, str(solution)
    assert solution.x.device.type == "cuda"
    expected = torch.linalg.solve(a.double(), b.double())
    torch.testing.assert_close(solution.x.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preconditioner", ["diagonal", "nystrom", "partial_cholesky"])
def test_preconditioners(gpu, preconditioner):
    a, b = system(60, 2, torch.float32, 0)
    options = {"damping": 0.1, "method": "cg", "preconditioner": preconditioner}
    assert jacpot.solve(a.to(gpu), b.to(gpu), **options).converged


def test_functions_and_one_right_hand_side(gpu):
    a, b = system(30, 1, torch.float64, 1)
    a, b = a.to(gpu), b[:, 0].to(gpu)
    solution = jacpot.solve(lambda v: a @ v, b, tol=1e-9)
    assert solution.converged
    assert solution.x.shape == (30,)


def test_what_fails_says_so(gpu):
    a, b = (t.to(gpu) for t in system(30, 1, torch.float64, 1))
    assert jacpot.solve(-a, b, method="cg").status is Status.indefinite
    assert jacpot.solve(a * torch.nan, b, method="cg").status is Status.non_finite
    assert jacpot.solve(a, b, method="cg", max_iter=1).status is Status.iteration_limit
    with pytest.raises(ValueError, match="'rhs' must be finite"):
        jacpot.solve(a, b * torch.nan)
