"""Conjugate gradients and LSMR: right, honest, and clear about what they refuse."""

from __future__ import annotations

import numpy
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot.linalg import (
    DenseOperator,
    FunctionOperator,
    Interrupted,
    LinearOperator,
    SolverError,
    Status,
)

DTYPES = [torch.float32, torch.float64]


def spd(size: int, condition: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -numpy.log10(condition), size, dtype=torch.float64)
    matrix = ((basis * values) @ basis.T).to(dtype)
    return (matrix + matrix.T) / 2


def right(size: int, count: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, count, generator=generator, dtype=dtype)


def relative_residual(a, b, x, damping=0.0):
    a, b = a.double(), b.double()
    return float(((b - a @ x - damping * x).norm(dim=0) / b.norm(dim=0)).max())


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 60),
    count=st.integers(1, 4),
    log_condition=st.floats(0, 4),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(["cg", "block_cg", "minres", "lsmr", "cholesky"]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_converged_means_that_the_float64_residual_is_small(
    any_device, size, count, log_condition, dtype, method, scale
):
    a = spd(size, 10**log_condition, dtype)
    b = right(size, count, dtype) * scale
    moved = a.to(any_device), b.to(any_device)
    solution = jacpot.solve(*moved, method=method, tol=1e-7, max_iter=5000)
    assert solution.converged, str(solution)
    residual = relative_residual(a, b, solution.x.cpu())
    assert residual <= 1.01e-7
    assert solution.relative_residual == pytest.approx(residual, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("method", ["cg", "block_cg", "minres", "lsmr", "cholesky"])
def test_damping_is_added_to_square_systems(method):
    a, b = spd(30, 1e3, torch.float64), right(30, 2, torch.float64)
    solution = jacpot.solve(a, b, damping=0.5, method=method, tol=1e-12)
    expected = torch.linalg.solve(a + 0.5 * torch.eye(30), b)
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "lsmr"])
@pytest.mark.parametrize("kind", ["array", "operator", "sparse"])
def test_damping_is_added_to_square_systems_that_are_not_symmetric(dtype, method, kind):
    a, b = right(30, 30, dtype, 4), right(30, 2, dtype)
    read = {
        "array": lambda: a,
        "operator": lambda: FunctionOperator(
            (30, 30), lambda x: a @ x, lambda x: a.T @ x, dtype, lambda: DenseOperator(a.double())
        ),
        "sparse": a.to_sparse,
    }[kind]
    if kind != "array":
        method = "lsmr"
    solution = jacpot.solve(read(), b, damping=2.0, method=method, tol=1e-9).raise_if_failed()
    assert relative_residual(a, b, solution.x, 2.0) <= 1.01e-9
    assert solution.relative_residual <= 1e-9


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_sparse_tensors(layout, dtype):
    a, b = spd(20, 100, dtype), right(20, 2, dtype)
    solution = jacpot.solve(a.to_sparse(layout=layout), b, tol=1e-9).raise_if_failed()
    torch.testing.assert_close(solution.x, torch.linalg.solve(a.double(), b.double()))
    tall = right(20, 5, dtype, 2)
    found = jacpot.solve(tall.to_sparse(layout=layout), b, tol=1e-10).raise_if_failed()
    torch.testing.assert_close(found.x, torch.linalg.lstsq(tall.double(), b.double()).solution)
    with pytest.raises(TypeError, match="'rhs' must be a dense tensor"):
        jacpot.solve(a, b.to_sparse(layout=layout))
    with pytest.raises(TypeError, match="'operator' must be float32"):
        jacpot.solve((a > 0).long().to_sparse(layout=layout), b)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 30))
def test_lsmr_finds_the_least_norm_least_squares_solution(any_device, rows, columns, rank):
    rank = min(rank, rows, columns)
    a = right(rows, rank, torch.float64, 2) @ right(rank, columns, torch.float64, 3)
    b = right(rows, 2, torch.float64)
    moved = a.to(any_device), b.to(any_device)
    x = jacpot.solve(*moved, method="lsmr", tol=1e-13, max_iter=2000).x.cpu()
    expected = torch.linalg.pinv(a, rtol=1e-10) @ b
    condition = float(numpy.linalg.cond(a.numpy())) if rank == min(rows, columns) else 1e3
    assert (x - expected).norm() <= 1e-10 * max(condition, 1.0) ** 2 * expected.norm()


def test_takes_functions_scipy_operators_and_numpy_arrays():
    a, b = spd(20, 100, torch.float64), right(20, 1, torch.float64)[:, 0]
    expected = torch.linalg.solve(a, b)
    wide = right(20, 3, torch.float64)
    torch.testing.assert_close(jacpot.solve(lambda v: a @ v, b, tol=1e-11).x, expected)
    torch.testing.assert_close(
        jacpot.solve(lambda v: a @ v, wide, tol=1e-11).x, torch.linalg.solve(a, wide)
    )
    for operator in (
        a.numpy(),
        scipy.sparse.csr_array(a.numpy()),
        scipy.sparse.linalg.aslinearoperator(a.numpy()),
        lambda v: a.numpy() @ v,
    ):
        x = jacpot.solve(operator, b.numpy(), tol=1e-11).x
        assert isinstance(x, numpy.ndarray)
        assert x.dtype == numpy.float64
        numpy.testing.assert_allclose(x, expected.numpy(), rtol=1e-8)


def test_a_preconditioner_helps():
    values = torch.logspace(0, 6, 100, dtype=torch.float64)
    b = right(100, 1, torch.float64)
    plain = jacpot.solve(torch.diag(values), b, tol=1e-10, method="cg")
    helped = jacpot.solve(
        torch.diag(values), b, tol=1e-10, preconditioner=lambda v: v / values[:, None]
    )
    assert helped.converged
    assert helped.iterations <= 3 < plain.iterations


def test_the_first_guess_is_used():
    a, b = spd(20, 100, torch.float64), right(20, 2, torch.float64)
    x = torch.linalg.solve(a, b)
    assert jacpot.solve(a, b, x0=x).iterations == 0


@pytest.mark.parametrize(
    ("matrix", "rhs", "status"),
    [
        ([[1.0, 0.0], [0.0, -1.0]], [0.0, 1.0], Status.indefinite),
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 1.0], Status.inconsistent),
        ([[float("nan"), 0.0], [0.0, 1.0]], [1.0, 1.0], Status.non_finite),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0], Status.inconsistent),
    ],
)
def test_failures_are_named(matrix, rhs, status):
    solution = jacpot.solve(torch.tensor(matrix), torch.tensor(rhs), method="cg")
    assert solution.status is status
    with pytest.raises(SolverError, match=status.value):
        solution.raise_if_failed()


def test_hitting_the_iteration_limit_is_said():
    a, b = spd(100, 1e6, torch.float64), right(100, 1, torch.float64)
    solution = jacpot.solve(a, b, max_iter=3, method="cg")
    assert solution.status is Status.iteration_limit
    assert solution.iterations == 3
    assert "max_iter" in str(solution)


def test_singular_consistent_systems_are_solved():
    a = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    b = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    solution = jacpot.solve(a, b, method="cg").raise_if_failed()
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["auto", "cg", "block_cg", "minres", "lsmr", "cholesky"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 0)])
def test_empty_systems(method, shape):
    a = torch.eye(shape[0], dtype=torch.float64)
    solution = jacpot.solve(a, torch.zeros(*shape, dtype=torch.float64), method=method)
    assert solution.converged
    assert solution.x.shape == shape


def test_a_zero_right_hand_side_gives_zero():
    b = torch.zeros(5, 2)
    b[:, 1] = 1
    solution = jacpot.solve(torch.eye(5), b).raise_if_failed()
    torch.testing.assert_close(solution.x, b.double())


def test_callback_sees_and_stops():
    seen = []

    def callback(iteration, residual, seconds):
        seen.append((iteration, residual, seconds))
        return iteration < 4

    a, b = spd(100, 1e6, torch.float64), right(100, 1, torch.float64)
    solution = jacpot.solve(a, b, callback=callback, method="cg")
    assert [iteration for iteration, _, _ in seen] == [1, 2, 3, 4]
    assert solution.status is Status.interrupted
    assert solution.history == [residual for _, residual, _ in seen]


def test_callback_may_solve_and_multiply_while_threads_stand_by():
    a, b = spd(600, 100, torch.float32), right(600, 1, torch.float32)
    inner = []

    def callback(iteration, residual, seconds):
        if iteration == 3:
            product = (a @ a).double()
            torch.testing.assert_close(product, a.double() @ a.double(), rtol=1e-4, atol=1e-5)
            inner.append(jacpot.solve(a, b, method="cg"))

    outer = jacpot.solve(a, b, callback=callback, method="cg")
    assert outer.converged
    assert inner[0].converged
    torch.testing.assert_close(inner[0].x, outer.x, rtol=0, atol=1e-5)


def test_interrupt_leaves_the_iterate():
    def callback(iteration, residual, seconds):
        if iteration == 20:
            raise KeyboardInterrupt

    a, b = spd(100, 100, torch.float64), right(100, 1, torch.float64)
    with pytest.raises(Interrupted) as info:
        jacpot.solve(a, b, callback=callback, tol=1e-12, method="cg")
    solution = info.value.solution
    assert solution.status is Status.interrupted
    assert 0 < relative_residual(a, b, solution.x) < 0.5
    assert solution.iterations == 20


def test_errors_of_the_function_come_through():
    def operator(v):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        jacpot.solve(operator, torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"operator": torch.eye(3, dtype=torch.int64)}, TypeError, "operator"),
        ({"operator": torch.ones(3)}, ValueError, "operator"),
        ({"operator": 3}, TypeError, "operator"),
        ({"rhs": torch.ones(4)}, ValueError, "rhs"),
        ({"rhs": torch.ones(3, dtype=torch.int64)}, TypeError, "rhs"),
        ({"rhs": torch.tensor([1.0, float("nan"), 0.0])}, ValueError, "rhs"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"max_iter": -1}, ValueError, "max_iter"),
        ({"max_iter": 1.5}, TypeError, "max_iter"),
        ({"tol": "small"}, TypeError, "tol"),
        ({"damping": None}, TypeError, "damping"),
        ({"damping": [0.1, 0.2]}, TypeError, "damping"),
        ({"method": "gauss"}, ValueError, "method"),
        ({"operator": torch.ones(3, 4), "method": "cg"}, ValueError, "square"),
        ({"x0": torch.ones(4)}, ValueError, "x0"),
        ({"preconditioner": torch.ones(3)}, TypeError, "preconditioner"),
        ({"preconditioner": "diagonals", "method": "lsmr"}, ValueError, "preconditioner"),
        ({"x0": torch.tensor([1.0, float("inf"), 0.0])}, ValueError, "'x0' must be finite"),
        ({"preconditioner": "diagonal", "method": "cholesky"}, ValueError, "preconditioner"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        jacpot.solve(**{"operator": torch.eye(3), "rhs": torch.ones(3), **arguments})


def test_a_linear_operator_needs_only_its_product():
    class Twice(LinearOperator):
        shape, dtype = (4, 4), torch.float64

        def _matmat(self, x):
            return 2 * x

        def _adjoint(self):
            return self

    twice = Twice()
    torch.testing.assert_close(twice.dense(), 2 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(twice.T @ torch.ones(4), torch.full((4,), 2.0, dtype=torch.float64))
    assert jacpot.solve(twice, torch.ones(4)).iterations == 1
    with pytest.raises(ValueError, match="argument 'x'"):
        twice @ torch.ones(5)


def test_a_rectangular_function_needs_its_transpose():
    with pytest.raises(ValueError, match="rmatmat"):
        FunctionOperator((2, 3), lambda x: x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_hand_sides_share_one_search_space(dtype):
    a, b = spd(200, 1e4, dtype), right(200, 12, dtype)
    b[:, 3] = b[:, 2] + b[:, 1]  # narrows the block, no more
    alone = jacpot.solve(a, b, method="cg", tol=1e-7).raise_if_failed()
    together = jacpot.solve(a, b, method="block_cg", tol=1e-7).raise_if_failed()
    if dtype == torch.float64:
        assert together.iterations < 0.3 * alone.iterations
    assert relative_residual(a, b, together.x) <= 1.01e-7
