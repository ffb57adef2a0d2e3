"""Preconditioners of the tangent fit: the same answer, in fewer iterations, and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jacpot
from jacpot.linalg.preconditioners import Nystrom
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator, KernelOperator
from jacpot.tangent.preconditioners import Auto, Kronecker, TraceKernel


def operator(n=60, width=64, dtype=torch.float32, spread=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).to(dtype)
    x = torch.randn(n, 6, dtype=dtype) * torch.logspace(0, spread, 6, dtype=dtype)
    j = jacpot.jacobian(net, x)
    return JacobianOperator(j.blocks, j.n_examples, j.n_outputs)


DUAL = [
    Auto(),
    Nystrom(rank=60),
    TraceKernel(),
    TraceKernel(coupled=True),
    TraceKernel(coarse=30),
    TraceKernel(coupled=True, coarse=30),
]


@pytest.mark.parametrize("preconditioner", DUAL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dual(preconditioner, dtype):
    kernel = KernelOperator(operator(dtype=dtype))
    ridge = 0.01 * float(kernel.diagonal().mean())
    rhs = torch.randn(kernel.shape[0], dtype=torch.float64)
    options = {"damping": ridge, "method": "cg", "tol": 1e-8}
    plain = jacpot.solve(kernel, rhs, **options).raise_if_failed()
    helped = jacpot.solve(kernel, rhs, preconditioner=preconditioner, **options)
    assert helped.converged, str(helped)
    assert helped.iterations < plain.iterations
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-4, atol=1e-5)
    assert helped.preconditioner != "none"


@pytest.mark.parametrize("preconditioner", [Auto(), Kronecker()], ids=repr)
def test_primal(preconditioner):
    matrix = GaussNewtonOperator(operator(n=200, width=8, spread=2.0))
    ridge = 0.01 * float(matrix.diagonal().mean())
    rhs = torch.randn(matrix.shape[0], dtype=torch.float64)
    options = {"damping": ridge, "method": "cg", "tol": 1e-6}
    plain = jacpot.solve(matrix, rhs, **options).raise_if_failed()
    helped = jacpot.solve(matrix, rhs, preconditioner=preconditioner, **options)
    assert helped.converged, str(helped)
    assert helped.iterations < plain.iterations


@pytest.mark.parametrize("examples", [9, 60])
def test_kronecker_inverse_also_of_fewer_examples_than_activations(examples):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    j = jacpot.jacobian(net, torch.randn(examples, 30).double())
    matrix = GaussNewtonOperator(JacobianOperator(j.blocks, examples, 2))
    inverse = Kronecker().prepare(matrix, 0.1).inverse
    expected = []
    for block in j.blocks:
        a, s = block.activations.reshape(examples, -1), block.signals.reshape(2 * examples, -1)
        a = torch.cat([a, torch.ones(examples, 1)], 1)
        dense = torch.kron(s.T @ s, a.T @ a / examples)
        order = torch.arange(len(dense)).reshape(s.shape[1], -1)
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])  # weights, then the bias
        expected.append(torch.linalg.inv(dense + 0.1 * torch.eye(len(dense)))[order][:, order])
    torch.testing.assert_close(inverse @ torch.eye(matrix.shape[0]), torch.block_diag(*expected))


def test_operators_write_out_what_they_multiply_by():
    j = operator(n=9, dtype=torch.float64)
    dense = j.dense()
    for matrix, expected in (
        (j, dense),
        (KernelOperator(j), dense @ dense.T),
        (GaussNewtonOperator(j), dense.T @ dense),
    ):
        x = torch.randn(matrix.shape[1], 2, dtype=torch.float64)
        torch.testing.assert_close(matrix.dense(), expected)
        torch.testing.assert_close(matrix @ x, expected @ x)
        torch.testing.assert_close(matrix.T @ (matrix @ x), expected.T @ (expected @ x))
        if matrix.shape[0] == matrix.shape[1]:
            torch.testing.assert_close(matrix.diagonal(), expected.diagonal())
            at = torch.tensor([4, 1, 7])
            torch.testing.assert_close(matrix.columns(at), expected[:, at])


def test_float64_products_of_float32_factors_are_sliced_alike(monkeypatch):
    j = operator(n=20)
    v = torch.randn(j.shape[1], 1, dtype=torch.float64)
    whole = j.double() @ v
    monkeypatch.setattr("jacpot.tangent.operators.SLICE_BYTES", 1 << 12)
    torch.testing.assert_close(j.double() @ v, whole)
    torch.testing.assert_close(
        j.double().T @ whole, j.dense().double().T @ whole, rtol=1e-5, atol=1e-5
    )


def test_the_wrong_space_is_refused():
    with pytest.raises(TypeError, match="dual"):
        TraceKernel().prepare(GaussNewtonOperator(operator(n=3)), 1.0)
    with pytest.raises(TypeError, match="primal"):
        Kronecker().prepare(KernelOperator(operator(n=3)), 1.0)


@pytest.mark.parametrize("preconditioner", ["diagonal", "kronecker", Kronecker()])
def test_lsmr_takes_one_of_the_primal(preconditioner):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(200, 6) * torch.logspace(0, 2, 6), torch.randn(200, 3)
    options = {"ridge": 0.1, "tol": 1e-8}
    lin = jacpot.linearize(net)
    plain = lin.fit(x, y, method="lsmr", **options).raise_if_failed()
    helped = lin.fit(x, y, method="lsmr", preconditioner=preconditioner, **options)
    assert helped.raise_if_failed().iterations < plain.iterations
    assert helped.preconditioner != "none"
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "ridge"), [("svd", 0.1), ("lsmr", 0.0), ("auto", 0.0)])
def test_a_preconditioner_that_would_be_ignored_or_change_the_answer_is_refused(method, ridge):
    lin, x = jacpot.linearize(nn.Linear(3, 1)), torch.randn(5, 3)
    with pytest.raises(ValueError, match="argument 'preconditioner' must be 'auto' here"):
        lin.fit(x, x[:, :1], ridge=ridge, method=method, preconditioner="diagonal")
    assert lin.fit(x, x[:, :1], ridge=ridge, method=method, preconditioner=None).converged
