"""Conjugate gradients for CUDA tensors, the logic of their kernels run on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot.linalg import Status
from jacpot.linalg.cuda import CHECK_EVERY, solve_on_cuda


def system(n, columns, dtype, seed, condition=100.0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    a = (q * values) @ q.T
    b = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    return ((a + a.T) / 2).to(dtype), b.to(dtype)


def solve(operator, rhs, damping=0.0, method="auto", tol=1e-8, max_iter=None, x0=None, **keywords):
    return solve_on_cuda(
        operator,
        rhs,
        damping,
        method,
        tol,
        max_iter,
        x0,
        keywords.get("preconditioner"),
        keywords.get("callback"),
    )


@settings(max_examples=5)
@given(
    n=st.integers(1, 30),
    columns=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    damping=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 50),
)
def test_the_residual_is_as_small_as_promised(emulated_cuda, n, columns, dtype, damping, seed):
    a, b = system(n, columns, dtype, seed)
    solution = solve(a, b, damping, tol=1e-7)
    assert solution.converged, str(solution)
    residual = b.double() - a.double() @ solution.x - damping * solution.x
    assert (residual.norm(dim=0) <= 1e-7 * b.double().norm(dim=0) * (1 + 1e-6)).all()
    assert solution.x.dtype == torch.float64


def test_more_right_hand_sides_than_a_block_has_threads(emulated_cuda):
    a, b = system(3, 300, torch.float64, 0)
    solution = solve(a, b)
    assert solution.converged
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)


def test_one_right_hand_side_and_a_function(emulated_cuda):
    a, b = system(40, 1, torch.float64, 0)
    solution = solve(lambda v: a @ v, b[:, 0], tol=1e-10)
    assert solution.converged
    assert solution.x.shape == (40,)
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b)[:, 0], rtol=1e-7, atol=1e-9)


def test_a_preconditioner_saves_iterations(emulated_cuda):
    a, b = system(50, 2, torch.float64, 1, condition=1e4)
    plain, helped = solve(a, b), solve(a, b, preconditioner=lambda r: torch.linalg.solve(a, r))
    assert plain.converged
    assert helped.converged
    assert helped.iterations <= CHECK_EVERY < plain.iterations


def test_cholesky_is_refined_to_float64(emulated_cuda):
    a, b = system(50, 2, torch.float32, 1, condition=1e3)
    solution = solve(a, b, method="cholesky", tol=1e-12)
    assert solution.converged
    assert solution.relative_residual < 1e-12


def test_what_does_not_converge_says_so(emulated_cuda):
    a, b = system(50, 1, torch.float64, 2, condition=1e6)
    assert solve(a, b, max_iter=3).status is Status.iteration_limit
    assert solve(-a, b).status is Status.indefinite
    assert solve(a * torch.nan, b).status is Status.non_finite
    assert not solve(a, b, tol=1e-30).converged
    stopped = solve(a, b, callback=lambda iteration, residual, seconds: False)
    assert stopped.status is Status.interrupted
    assert stopped.iterations == CHECK_EVERY


def test_zero_columns_and_first_guesses(emulated_cuda):
    a, b = system(30, 3, torch.float64, 3)
    b[:, 1] = 0
    solution = solve(a, b)
    assert solution.converged
    assert not solution.x[:, 1].any()
    again = solve(a, b, x0=solution.x)
    assert again.converged
    assert again.iterations == 0


def test_refusals(emulated_cuda):
    a, b = system(5, 1, torch.float64, 0)
    with pytest.raises(NotImplementedError, match="'lsmr' has no CUDA version; 'cg' and"):
        solve(a, b, method="lsmr")
    with pytest.raises(ValueError, match="'operator' must be on cpu like 'rhs', got meta"):
        solve(a.to("meta"), b)
    with pytest.raises(ValueError, match=r"'operator' must have shape \(5, 5\)"):
        solve(a[:4], b)
