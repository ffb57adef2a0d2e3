"""The solvers for CUDA tensors, the logic of their kernels run on the CPU."""

from __future__ import annotations

import gc
import weakref

import pretend_streams
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_graph import PretendGraph, RecordedKernels

import jacpot
from jacpot import _backend
from jacpot.linalg import DenseOperator, FunctionOperator, Status, solve
from jacpot.linalg.cuda import SOLVERS
from jacpot.linalg.cuda_cg import CHECK_EVERY
from jacpot.linalg.cuda_refine import refine
from jacpot.ops.jacobian import Added, Factors, Lookup, Rows
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator, KernelOperator

EVERY = ["cg", "block_cg", "cholesky", "lsmr", "minres"]


def system(n, columns, dtype, seed, condition=100.0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    a = (q * values) @ q.T
    b = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    return ((a + a.T) / 2).to(dtype), b.to(dtype)


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=5)
@given(
    n=st.integers(1, 30),
    columns=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    damping=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 50),
)
def test_the_residual_is_as_small_as_promised(
    emulated_cuda, method, n, columns, dtype, damping, seed
):
    a, b = system(n, columns, dtype, seed)
    solution = solve(a, b, damping, method, tol=1e-7)
    assert solution.converged, str(solution)
    residual = b.double() - a.double() @ solution.x - damping * solution.x
    assert (residual.norm(dim=0) <= 1e-7 * b.double().norm(dim=0) * (1 + 1e-6)).all()
    assert solution.x.dtype == torch.float64


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    columns=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    damping=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 50),
)
def test_least_squares_and_least_norm(emulated_cuda, shape, columns, dtype, damping, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator, dtype=torch.float64) + 4 * torch.eye(*shape)
    a, b = a.to(dtype), torch.randn(shape[0], columns, generator=generator, dtype=torch.float64)
    solution = solve(a, b.to(dtype), damping, "lsmr", tol=1e-9)
    assert solution.converged, str(solution)
    u, values, v = torch.linalg.svd(a.double(), full_matrices=False)
    expected = v.T @ ((values / (values**2 + damping))[:, None] * (u.T @ b.to(dtype).double()))
    if shape[0] == shape[1]:
        expected = torch.linalg.solve(
            a.double() + damping * torch.eye(*shape), b.to(dtype).double()
        )
    condition = float(values.max() / values.min()) ** 2
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-7 * condition)


def test_more_right_hand_sides_than_a_block_has_threads(emulated_cuda):
    a, b = system(3, 300, torch.float64, 0)
    solution = solve(a, b, method="cg", tol=1e-8)
    assert solution.converged
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)


def test_one_right_hand_side_and_a_function(emulated_cuda):
    a, b = system(40, 1, torch.float64, 0)
    solution = solve(lambda v: a @ v, b[:, 0], tol=1e-10)
    assert solution.converged
    assert solution.method == "cg"
    assert solution.x.shape == (40,)
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b)[:, 0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["cg", "block_cg"])
def test_a_preconditioner_saves_iterations(emulated_cuda, method):
    a, b = system(50, 2, torch.float64, 1, condition=1e4)
    plain = solve(a, b, method=method, tol=1e-8)
    helped = solve(a, b, method=method, tol=1e-8, preconditioner=lambda r: torch.linalg.solve(a, r))
    assert plain.converged
    assert helped.converged
    assert helped.iterations <= 4 < plain.iterations


def test_lsmr_takes_a_preconditioner_of_the_normal_equations(emulated_cuda):
    a, b = system(60, 2, torch.float64, 1, condition=1e4)
    a = a[:, :40] * torch.logspace(0, 3, 40, dtype=torch.float64)
    inverse = torch.linalg.inv(a.T @ a)
    plain = solve(a, b, method="lsmr", tol=1e-8)
    for helper in (lambda v: inverse @ v, "diagonal"):
        helped = solve(a, b, method="lsmr", tol=1e-8, preconditioner=helper)
        assert helped.converged, str(helped)
        assert helped.iterations < plain.iterations
        torch.testing.assert_close(
            helped.x, torch.linalg.lstsq(a, b).solution, rtol=1e-4, atol=1e-6
        )
    wrong = solve(a, b, method="lsmr", preconditioner=lambda v: -v)
    assert wrong.status is Status.preconditioner


@pytest.mark.parametrize("name", ["diagonal", "nystrom", "partial_cholesky"])
def test_named_preconditioners(emulated_cuda, name):
    a, b = system(40, 2, torch.float32, 1, condition=1e3)
    assert solve(a, b, 0.1, method="cg", preconditioner=name).converged


def test_block_cg_shares_its_search_space(emulated_cuda):
    a, b = system(60, 6, torch.float64, 4, condition=1e3)
    together = solve(a, b, method="block_cg", tol=1e-10)
    alone = solve(a, b, method="cg", tol=1e-10)
    assert together.converged
    assert 2 * together.iterations < alone.iterations


@settings(max_examples=8)
@given(n=st.integers(1, 20), seed=st.integers(0, 99), rank=st.integers(0, 20))
def test_eigenvalues_and_vectors_of_small_matrices(emulated_cuda, n, seed, rank):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    a = root @ root.T - (root @ root.T).trace() / n * torch.eye(n) * (seed % 2)
    values, vectors = torch.full((n,), torch.nan).double(), torch.full((n, n), torch.nan).double()
    emulated_cuda.eigen(a, values, vectors, 0, 0)
    size = 1e-14 * max(1.0, a.abs().max().item()) * n
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(n).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors * values @ vectors.T, a, rtol=0, atol=size)
    expected = torch.linalg.eigvalsh(a)
    torch.testing.assert_close(values.sort().values, expected, rtol=0, atol=size)


def test_eigenvalues_of_what_is_not_finite_are_not(emulated_cuda):
    a = torch.eye(3, dtype=torch.float64)
    a[0, 1] = a[1, 0] = torch.nan
    values, vectors = torch.zeros(3).double(), torch.zeros(3, 3).double()
    emulated_cuda.eigen(a, values, vectors, 0, 0)
    assert not values[:2].isfinite().any()


def test_more_right_hand_sides_than_a_search_space_factors_on_the_device(emulated_cuda):
    a, b = system(70, 60, torch.float64, 0)
    assert emulated_cuda.eigen_limit(0) < 60
    solution = solve(a, b, method="block_cg", tol=1e-8)
    assert solution.converged
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)


def test_block_cg_of_dependent_right_hand_sides(emulated_cuda):
    a, b = system(30, 3, torch.float64, 5)
    b = torch.cat([b, b[:, :1] * 1e-6, b[:, 1:2] - b[:, 2:], torch.zeros(30, 1)], 1)
    solution = solve(a, b, method="block_cg", tol=1e-9)
    assert solution.converged, str(solution)
    assert not solution.x[:, -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_minres_solves_what_is_indefinite(emulated_cuda, dtype, preconditioned):
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    values = torch.linspace(1, 2, 40, dtype=torch.float64) * (1 - 2.0 * (torch.arange(40) % 3 == 0))
    a = ((q * values) @ q.T).to(dtype)
    b = torch.randn(40, 3, generator=generator, dtype=torch.float64).to(dtype)
    inverse = (q / values.abs()) @ q.T  # of |A|: what is left has eigenvalues of ±1
    options = {"preconditioner": lambda r: inverse @ r.double()} if preconditioned else {}
    solution = solve(a, b, method="minres", tol=1e-8, **options)
    assert solution.converged, str(solution)
    exact = torch.linalg.solve(a.double(), b.double())
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    if preconditioned:
        assert solution.iterations <= 8


def test_minres_names_what_it_cannot_solve(emulated_cuda):
    a, b = torch.diag(torch.tensor([1.0, 2.0, 0.0])).double(), torch.ones(3, 2).double()
    assert solve(a, b, method="minres").status is Status.inconsistent
    b[2] = 0
    assert solve(a, b, method="minres").converged
    solution = solve(a, b, method="minres", preconditioner=lambda r: -r)
    assert solution.status is Status.preconditioner
    a[0, 0] = torch.nan
    assert solve(a, b, method="minres").status is Status.non_finite


def test_cholesky_is_refined_to_float64(emulated_cuda):
    a, b = system(50, 2, torch.float32, 1, condition=1e3)
    solution = solve(a, b, method="cholesky", tol=1e-12)
    assert solution.converged
    assert solution.relative_residual < 1e-12


@pytest.mark.parametrize("method", ["cg", "block_cg"])
def test_what_does_not_converge_says_so(emulated_cuda, method):
    a, b = system(50, 1, torch.float64, 2, condition=1e6)
    assert solve(a, b, method=method, max_iter=3).status is Status.iteration_limit
    assert solve(-a, b, method=method).status is Status.indefinite
    assert solve(a * torch.nan, b, method=method).status is Status.non_finite
    assert not solve(a, b, method=method, tol=1e-30).converged
    stopped = solve(a, b, method=method, callback=lambda iteration, residual, seconds: False)
    assert stopped.status is Status.interrupted
    assert stopped.iterations <= CHECK_EVERY


@pytest.mark.parametrize("method", EVERY)
def test_zero_columns_and_first_guesses(emulated_cuda, method):
    a, b = system(30, 3, torch.float64, 3)
    b[:, 1] = 0
    solution = solve(a, b, method=method, tol=1e-8)
    assert solution.converged
    assert not solution.x[:, 1].any()
    again = solve(a, b, method=method, x0=solution.x, tol=1e-8)
    assert again.converged
    assert again.iterations == 0


@pytest.fixture
def graphs(emulated_cuda, monkeypatch):
    """Graphs that are pretended, and a list of those that were recorded."""
    monkeypatch.setattr(_backend, "cuda", lambda: RecordedKernels(emulated_cuda))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(pretend_streams, name))
    monkeypatch.setattr(PretendGraph, "made", [])
    return PretendGraph.made


@pytest.mark.parametrize("method", ["cg", "block_cg"])
@pytest.mark.parametrize("preconditioner", [None, "nystrom", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_replayed_iteration_is_the_iteration(graphs, method, preconditioner, dtype):
    """With restarts, which must leave the memory of the recording in use."""
    a, b = system(40, 3, dtype, 1, condition=1e3)
    options = {"method": method, "tol": 1e-11, "preconditioner": preconditioner}
    replayed = solve(a, b, 0.01, **options)
    assert replayed.converged, str(replayed)
    assert len(graphs) == 1
    assert graphs[0].replays == replayed.iterations - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseOperator, "replayable", False)
        plain = solve(a, b, 0.01, **options)
    assert len(graphs) == 1
    assert torch.equal(replayed.x, plain.x)
    assert replayed.history == plain.history


@pytest.mark.parametrize("density", [None, 0.05, 0.5])
@pytest.mark.parametrize("kind", [KernelOperator, GaussNewtonOperator])
def test_products_with_a_small_jacobian_are_replayed(graphs, kind, density):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 2, 1, 30, generator=generator).double()
    s = torch.randn(8, 3, 2, 1, 9, generator=generator).double()
    pattern = None
    if density is not None:
        pattern = jacpot.Pattern(torch.rand(9, 30, generator=generator) < density)
    rows = torch.randn(8, 3, 4, generator=generator).double()
    tokens = torch.randint(0, 6, (8, 5), generator=generator)
    seen = torch.randn(8, 3, 5, 2, generator=generator).double()
    kept = None if density is None else torch.rand(6, 2, generator=generator) < 0.7
    table = Lookup(tokens, seen, 6, kept)
    blocks = [Factors(a, s, pattern, bias=True), Rows(rows), table, Added((table, table))]
    operator = kind(JacobianOperator(blocks, 8, 3))
    b = torch.randn(operator.shape[0], 2, generator=generator).double()
    replayed = solve(operator, b, 5.0, method="cg", tol=1e-10)
    assert replayed.converged, str(replayed)
    assert [graph.replays for graph in graphs] == [replayed.iterations - 1]
    operator.replayable = False
    plain = solve(operator, b, 5.0, method="cg", tol=1e-10)
    assert torch.equal(replayed.x, plain.x)


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_gives_its_memory_back_at_once(graphs, method):
    """Not when Python next looks for circles: much of a GPU's memory could wait for that."""
    a, b = system(20, 2, torch.float64, 1)
    solver = SOLVERS[method](DenseOperator(a), b, torch.zeros_like(b), 0.0, None, 1e-8, 40, None)
    gc.disable()
    try:
        assert refine(solver)["outcome"] == "converged"
        alive = weakref.ref(solver)
        del solver
        assert alive() is None
    finally:
        gc.enable()


def test_what_may_not_be_recorded_is_not(graphs):
    a, b = system(30, 1, torch.float64, 2)
    calls = []

    def product(x):
        calls.append(0)
        return a @ x

    solution = solve(product, b, method="cg", tol=1e-8)
    assert solution.converged
    assert not graphs
    assert len(calls) >= solution.iterations


def test_what_cannot_be_recorded_goes_on_as_it_is(graphs):
    a, b = system(30, 1, torch.float64, 2)

    def reading(x):
        return a @ x if len(x.nonzero()) else x  # which is known on the host alone

    operator = FunctionOperator((30, 30), reading)
    operator.replayable = True
    solution = solve(operator, b, method="cg", tol=1e-8)
    assert solution.converged
    assert len(graphs) == 1
    assert not graphs[0].replays
    assert torch.equal(solution.x, solve(lambda x: a @ x, b, method="cg", tol=1e-8).x)


def test_a_replayed_iteration_on_a_gpu(real_gpu):
    a, b = system(300, 3, torch.float32, 1, condition=1e3)
    a, b = a.to(real_gpu), b.to(real_gpu)
    replayed = solve(a, b, method="cg", tol=1e-9)
    plain = solve(lambda x: a @ x, b, method="cg", tol=1e-9)
    assert replayed.converged
    torch.testing.assert_close(replayed.x, plain.x, rtol=1e-6, atol=1e-8)


def test_refusals(emulated_cuda):
    a, b = system(5, 1, torch.float64, 0)
    with pytest.raises(ValueError, match="'operator' must be on the CPU or a CUDA device, got me"):
        solve(a.to("meta"), b)
    with pytest.raises(ValueError, match="must have 4 rows like the operator, got 5"):
        solve(a[:4], b)
