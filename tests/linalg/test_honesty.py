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
from jacpot.linalg import FunctionOperator, Status

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
    if rows == N:  # a square one is (A + damping·I) x = b
        exact_a, damping = exact_a + damping * numpy.eye(N), 0.0
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


METHODS = ("auto", "cg", "block_cg", "minres", "lsmr", "cholesky")
EXTREMES = (1e-300, 1e-170, 1e-155, 1e-100, 1e100, 1e155, 1e160, 1e300)


def right_hand_sides_of_size(n):
    return numpy.random.default_rng(2).standard_normal(n)


def norm_of(v):
    """Euclidean, without over- and underflow of squares."""
    largest = numpy.abs(v).max(initial=0.0)
    return largest * numpy.linalg.norm(v / largest) if 0 < largest < numpy.inf else largest


@pytest.mark.parametrize("scale", EXTREMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["array", "function"])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_scales_whose_squares_over_or_underflow(scale, method, kind, damping):
    a, b = MATRICES["condition 1e2"] * scale, right_hand_sides_of_size(N)
    tensor = torch.from_numpy(a)
    operator = tensor
    if kind == "function":
        if method == "cholesky":
            pytest.skip("needs an array")
        operator = FunctionOperator((N, N), lambda x: tensor @ x)
    solution = jacpot.solve(
        operator, torch.from_numpy(b), damping=damping * scale, method=method, tol=TOL
    )
    assert solution.converged, str(solution)
    x = solution.x.numpy()
    residual = b - a @ x - damping * scale * x
    assert norm_of(residual) <= TOL * norm_of(b) * (1 + 1e-6)
    assert solution.relative_residual <= TOL


@pytest.mark.parametrize(
    ("scale", "damping"),
    [*((s, 0.0) for s in EXTREMES), (1e-140, 1.0), (1e-100, 1.0), (1e140, 1.0)],
)
def test_least_squares_of_extreme_scale(scale, damping):
    rng = numpy.random.default_rng(3)
    a, b = rng.standard_normal((N, 5)), rng.standard_normal(N)
    if damping:
        damping = scale**2
    solution = jacpot.solve(
        torch.from_numpy(a * scale), torch.from_numpy(b), damping=damping, tol=1e-12
    )
    assert solution.converged, str(solution)
    expected = numpy.linalg.solve(a.T @ a + bool(damping) * numpy.eye(5), a.T @ b)
    numpy.testing.assert_allclose(solution.x.numpy() * scale, expected, rtol=1e-8)


@pytest.mark.parametrize("preconditioner", ["diagonal", "nystrom", "partial_cholesky", "inverse"])
@pytest.mark.parametrize("scale", [1e-170, 1e-130, 1e130, 1e160])
@pytest.mark.parametrize("method", ["cg", "minres", "lsmr"])
def test_preconditioners_at_extreme_scales(preconditioner, scale, method):
    if method == "lsmr" and preconditioner in ("nystrom", "partial_cholesky"):
        pytest.skip("damping goes to the diagonal of a square matrix: they have none")
    if method == "lsmr" and preconditioner == "inverse" and not 1e-150 < scale < 1e150:
        pytest.skip("the inverse of the squares is out of range itself")
    a = torch.from_numpy(MATRICES["condition 1e4"])
    inverse = torch.linalg.inv(a + 1e-3 * torch.eye(N)) / scale
    b = torch.from_numpy(right_hand_sides_of_size(N))

    def helper(v):
        return inverse @ (inverse @ v) if method == "lsmr" else inverse @ v

    solution = jacpot.solve(
        a * scale, b, 1e-3 * scale, method=method, tol=TOL,
        preconditioner=helper if preconditioner == "inverse" else preconditioner,
    )  # fmt: skip
    assert solution.converged, str(solution)
    if preconditioner == "inverse":
        assert solution.iterations <= 3


@pytest.mark.parametrize("method", ["minres", "lsmr"])
@pytest.mark.parametrize("name", [n for n in MATRICES if n not in ("nan", "infinite")])
@pytest.mark.parametrize("preconditioner", ["diagonal", "inverse"])
def test_preconditioned_claims_are_true(method, name, preconditioner):
    matrix = MATRICES[name]
    target = matrix.T @ matrix if method == "lsmr" else matrix
    values, vectors = numpy.linalg.eigh(target)
    size = numpy.maximum(numpy.abs(values), 1e-3 * numpy.abs(values).max(initial=1e-3))
    inverse = torch.from_numpy(vectors / size @ vectors.T)
    helper = (lambda v: inverse @ v) if preconditioner == "inverse" else preconditioner
    for _, rhs in right_hand_sides(matrix):
        a, b = torch.from_numpy(matrix), torch.from_numpy(rhs)
        solution = jacpot.solve(a, b, method=method, tol=TOL, max_iter=2000, preconditioner=helper)
        assert solution.converged or name not in DEFINITE, str(solution)
        if solution.converged:
            relative, normal = residuals(matrix, rhs, solution.x.numpy())
            assert (numpy.minimum(relative, normal if method == "lsmr" else numpy.inf) <= TOL).all()


@pytest.mark.parametrize("method", ["cg", "block_cg", "minres", "lsmr"])
def test_a_preconditioner_that_is_not_finite(method):
    a, b = torch.from_numpy(MATRICES["condition 1e2"]), torch.ones(N, 2, dtype=torch.float64)
    solution = jacpot.solve(a, b, method=method, preconditioner=lambda v: v * numpy.nan)
    assert solution.status is Status.non_finite
    assert not solution.relative_residual < 1


@pytest.mark.parametrize("method", METHODS)
def test_the_solution_of_a_zero_right_hand_side_is_zero(method):
    a, guess = torch.from_numpy(MATRICES["condition 1e2"]), torch.ones(N, 2, dtype=torch.float64)
    b = torch.zeros(N, 2, dtype=torch.float64)
    solution = jacpot.solve(a, b, method=method, x0=guess)
    assert solution.converged
    assert not solution.x.any()
    assert solution.relative_residual == 0
    b[:, 1] = 1
    solution = jacpot.solve(a, b, method=method, x0=guess)
    assert solution.converged
    assert not solution.x[:, 0].any()


@pytest.mark.parametrize(("size", "of_b"), [(1e-200, 1e200), (1e200, 1e-200)])
def test_a_solution_beyond_float64_is_not_called_one(size, of_b):
    a, b = torch.eye(3, dtype=torch.float64) * size, torch.full((3,), of_b, dtype=torch.float64)
    solution = jacpot.solve(a, b, method="cg")
    assert not solution.converged, str(solution)
