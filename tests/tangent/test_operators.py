from __future__ import annotations

import pytest
import torch

import jacpot
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
