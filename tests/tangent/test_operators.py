from __future__ import annotations

import pytest
import torch

import jacpot
from jacpot._backend import core
from jacpot.ops.jacobian import Factors, Rows
from jacpot.tangent.operators import GaussNewtonOperator, JacobianOperator, KernelOperator


@pytest.mark.parametrize("kind", [KernelOperator, GaussNewtonOperator, JacobianOperator])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_dense_operator_is_its_product_with_the_identity(kind, n):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    j = jacpot.jacobian(net, torch.randn(n, 3))
    operator = JacobianOperator(j.blocks, j.n_examples, j.n_outputs)
    if kind is not JacobianOperator:
        operator = kind(operator)
    for precision in (operator, operator.double()):
        unit = torch.eye(precision.shape[1], dtype=precision.dtype)
        expected = precision @ unit
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision is operator else {}
        torch.testing.assert_close(precision.dense(), expected, **tolerance)


def blocks_of_every_kind(n, k, dtype):
    """Factors with groups, positions (also innermost), a bias and a mask; and rows."""
    make = torch.Generator().manual_seed(n + k)

    def draw(*shape):
        return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)

    mask = torch.rand(6, 5, generator=make) < 0.4
    mask[0] = False
    return [
        Factors(draw(n, 1, 1, 3), draw(n, k, 1, 1, 4), bias=True),
        Factors(draw(n, 2, 2, 3), draw(n, k, 2, 2, 4)),
        Factors(draw(n, 4, 1, 3), draw(n, k, 1, 5, 4).permute(0, 1, 4, 2, 3), bias=True),
        Factors(draw(n, 2, 1, 5), draw(n, k, 2, 1, 6), pattern=jacpot.Pattern(mask), bias=True),
        Rows(draw(n, k, 7)),
        Rows(draw(n, k, 0)),
    ]


@pytest.mark.parametrize("kind", [KernelOperator, GaussNewtonOperator, JacobianOperator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("n", "k", "r"), [(0, 2, 1), (1, 1, 1), (5, 3, 1), (5, 3, 4), (4, 2, 0)])
def test_what_the_solvers_multiply_by_is_the_matrix(kind, dtype, full, n, k, r):
    jacobian = JacobianOperator(blocks_of_every_kind(n, k, dtype), n, k)
    operator = jacobian if kind is JacobianOperator else kind(jacobian)
    compiled = operator._core()
    assert isinstance(compiled, core.JacobianOperator)
    assert (compiled.rows, compiled.columns) == operator.shape
    dense = jacobian.double().dense()
    matrix = {
        JacobianOperator: dense,
        KernelOperator: dense @ dense.T,
        GaussNewtonOperator: dense.T @ dense,
    }[kind]
    exact = full or dtype == torch.float64
    for transposed in (False, True):
        side = matrix.T if transposed else matrix
        for _ in range(2):  # a second time the vectors are there already
            x = torch.randn(side.shape[1], r, dtype=torch.float64)
            out = torch.full((side.shape[0], r), torch.nan, dtype=torch.float64)
            compiled.apply(x.numpy(), out.numpy(), transposed, full)
            error = (out - side @ x).abs().sum()
            size = (side.abs() @ x.abs()).sum()
            assert error <= (1e-14 if exact else 1e-5) * size


def test_blocks_of_different_sizes_are_refused():
    ones = torch.ones(3, 1, 2)
    with pytest.raises(ValueError, match="'blocks' must have 3 rows each, got 4"):
        core.JacobianOperator("kernel", [ones, torch.ones(4, 1, 2)], 3, None, 1)
    with pytest.raises(TypeError, match="'rows' must be float32"):
        core.JacobianOperator("kernel", [ones, ones.double()], 3, None, 1)
    with pytest.raises(ValueError, match="'form' must be"):
        core.JacobianOperator("inverse", [ones], 3, None, 1)
    with pytest.raises(ValueError, match="'blocks' must hold at least one"):
        core.JacobianOperator("kernel", [], 0, None, 1)
