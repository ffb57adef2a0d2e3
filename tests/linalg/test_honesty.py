"""More than 200 systems, easy to hopeless: what is called converged is, and failures are named.

One table of matrices, crossed with right-hand sides, scales, dtypes and methods. The residual is
recomputed here, in float64 NumPy, with nothing of the solver's.
"""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

import jacpot
from jacpot.linalg import Status

N = 24
TOL = 1e-8


def basis(rows, columns, seed=0):
    rng = numpy.random.default_rng(seed)
    return numpy.linalg.qr(rng.standard_normal((max(rows, columns),) * 2))[0][:rows, :columns]


def spectral(values):
    q = basis(len(values), len(values))
    a = (q * numpy.asarray(values, dtype=float)) @ q.T
    return (a + a.T) / 2


MATRICES = {
    **{f"condition 1e{k}": spectral(numpy.logspace(0, -k, N)) for k in (0, 2, 4, 6, 8, 11, 14)},
    "repeated": spectral([1.0] * 8 + [5.0] * 8 + [9.0] * 8),
    "clustered": spectral(numpy.repeat([1.0, 1e3, 1e6], 8) * (1 + 1e-9 * numpy.arange(N))),
    "one outlier": spectral([1e8] + [1.0] * (N - 1)),
    "singular": spectral([*numpy.linspace(1, 2, N - 4), 0, 0, 0, 0]),
    "rank one": spectral([1.0] + [0.0] * (N - 1)),
    "zero": numpy.zeros((N, N)),
    "indefinite": spectral(numpy.linspace(-1, 2, N)),
    "negative": spectral(-numpy.linspace(1, 2, N)),
    "saddle": numpy.block([[numpy.eye(16), basis(16, 8)], [basis(16, 8).T, numpy.zeros((8, 8))]]),
    "diagonal of many scales": numpy.diag(numpy.logspace(-6, 6, N)),
    "1 x 1": numpy.array([[3.0]]),
    "1 x 1 zero": numpy.array([[0.0]]),
    "empty": numpy.zeros((0, 0)),
    "nan": numpy.where(numpy.eye(N) > 0, numpy.nan, 0.0),
    "infinite": numpy.where(numpy.eye(N) > 0, numpy.inf, 0.0),
}

DEFINITE = {
    "condition 1e0", "condition 1e2", "condition 1e4", "repeated", "1 x 1",
}  # fmt: skip


def right_hand_sides(a):
    n = len(a)
    rng = numpy.random.default_rng(1)
    b = rng.standard_normal((n, 3))
    finite = numpy.nan_to_num(a, posinf=0.0)
    yield "random", b
    yield "in the range", finite @ b
    yield "dependent", numpy.stack([b[:, 0], 2 * b[:, 0], b[:, 0] + b[:, 1]], axis=1)
    yield "zero", numpy.zeros((n, 1))
    if n > 1:
        null = numpy.linalg.svd(finite)[0][:, -1:]
        yield "smallest direction", null


CASES = [
    (name, rhs, method, dtype, scale)
    for name, method, (dtype, scale) in itertools.product(
        MATRICES,
        ("auto", "cg", "block_cg", "minres", "lsmr", "cholesky"),
        ((torch.float64, 1.0), (torch.float32, 1.0), (torch.float64, 1e30), (torch.float64, 1e-30)),
    )
    for rhs, _ in right_hand_sides(MATRICES[name])
    if dtype == torch.float64 or "scales" not in name
]


def residuals(a, b, x):
    """Relative residual of each column, and that of the normal equations, exactly in float64."""
    r = b - a @ x
    norm_b, norm_r = numpy.linalg.norm(b, axis=0), numpy.linalg.norm(r, axis=0)
    norm_a = numpy.linalg.norm(a, 2) if a.size else 0.0
    pulled = numpy.linalg.norm(a.T @ r, axis=0)
    relative = numpy.divide(norm_r, norm_b, out=norm_r.copy(), where=norm_b > 0)
    scale = norm_a * norm_r
    return relative, numpy.divide(pulled, scale, out=numpy.zeros_like(pulled), where=scale > 0)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", ["auto", "cg", "block_cg", "minres", "lsmr", "cholesky"])
def test_converged_is_true_and_failures_have_a_reason(name, method):
    matrix = MATRICES[name]
    for case in CASES:
        if case[0] != name or case[2] != method:
            continue
        _, rhs, _, dtype, scale = case
        a = torch.from_numpy(matrix * scale).to(dtype)
        b = torch.from_numpy(dict(right_hand_sides(matrix))[rhs] / scale).to(dtype)
        solution = jacpot.solve(a, b, method=method, tol=TOL, max_iter=2000)
        assert isinstance(solution.status, Status)
        exact_a, exact_b = a.double().numpy(), b.double().numpy()
        x = solution.x.numpy()
        if not solution.converged:
            assert name not in DEFINITE or dtype == torch.float32, (case, str(solution))
            if name in ("nan", "infinite"):
                assert solution.status is Status.non_finite, (case, str(solution))
            if name == "negative" and method in ("cg", "block_cg", "cholesky"):
                assert solution.status is Status.indefinite, (case, str(solution))
            continue
        assert numpy.isfinite(x).all(), case
        if not exact_b.any():
            assert not x.any(), case
            continue
        relative, normal = residuals(exact_a, exact_b, x)
        if solution.method == "lsmr":
            relative = numpy.minimum(relative, normal)
        assert (relative <= TOL * (1 + 1e-6)).all(), (case, str(solution), relative)


def test_there_are_more_than_200_systems():
    assert len(set(CASES)) >= 200 * 5


@pytest.mark.parametrize("rows", [1, 5, 24, 40])
@pytest.mark.parametrize("rank", [1, 5, 24])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_of_any_shape(rows, rank, damping, dtype):
    rng = numpy.random.default_rng(rows + rank)
    a = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, N))
    b = rng.standard_normal(rows)
    a, b = torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)
    solution = jacpot.solve(a, b, damping=damping, tol=TOL, max_iter=2000)
    exact_a, exact_b, x = a.double().numpy(), b.double().numpy(), solution.x.numpy()
    r = exact_b - exact_a @ x
    gradient = numpy.linalg.norm(exact_a.T @ r - damping * x)
    total = numpy.hypot(numpy.linalg.norm(r), damping**0.5 * numpy.linalg.norm(x))
    assert solution.converged, str(solution)
    assert (
        total <= TOL * numpy.linalg.norm(exact_b) * (1 + 1e-6)
        or gradient
        <= TOL * (1 + 1e-6) * numpy.hypot(numpy.linalg.norm(exact_a, 2), damping**0.5) * total
    )


def test_dependent_right_hand_sides_agree_with_each_other():
    a = torch.from_numpy(MATRICES["condition 1e4"])
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(N, 1, dtype=torch.float64, generator=generator)
    b = column @ torch.tensor([[1.0, 2.0, 0.0, -1.0]]).double()
    for method in ("cg", "block_cg", "minres", "lsmr", "cholesky"):
        x = jacpot.solve(a, b, method=method, tol=1e-12).raise_if_failed().x
        torch.testing.assert_close(x[:, 1], 2 * x[:, 0], rtol=1e-6, atol=1e-8)
        assert not x[:, 2].any()
