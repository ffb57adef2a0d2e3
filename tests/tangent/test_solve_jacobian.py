"""`jacpot.solve` takes a Jacobian, always for least squares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jacpot
from jacpot.tangent.operators import OrderedOperator


class Product(nn.Module):
    """``x W``: its block is that of Wᵀ."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(x @ self.weight))


def networks():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(5, 2), torch.randn(3, 5)),
        "columns in another order": (Product(), torch.randn(5, 4)),
        "square": (nn.Linear(5, 1), torch.randn(6, 5)),
        "tall": (nn.Linear(2, 2), torch.randn(30, 2)),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_jacobian_is_least_squares(name, damping):
    net, x = networks()[name]
    net, x = net.double(), x.double()
    jacobian = jacpot.jacobian(net, x)
    dense = jacobian.dense().flatten(0, 1)
    b = torch.randn(len(dense), 2, dtype=torch.float64)
    solution = jacpot.solve(jacobian, b, damping=damping, tol=1e-11).raise_if_failed()
    u, values, v = torch.linalg.svd(dense, full_matrices=False)
    weights = torch.where(values > 1e-10 * values[0], values / (values**2 + damping), 0.0)
    expected = v.T @ (weights[:, None] * (u.T @ b))
    torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-8)
    pulled = jacpot.solve(jacobian.T, solution.x, tol=1e-11).raise_if_failed()
    torch.testing.assert_close(dense.T @ pulled.x, solution.x, rtol=1e-6, atol=1e-7)


def test_a_square_jacobian_is_not_taken_for_a_matrix():
    net, x = networks()["square"]
    with pytest.raises(ValueError, match="needs a square operator, got a Jacobian; use 'lsmr'"):
        jacpot.solve(jacpot.jacobian(net, x), torch.ones(6), method="cg")


def test_a_fit_with_as_many_outputs_as_parameters():
    """Its ridge belongs to the normal equations, whatever the shape."""
    net, x = networks()["square"]
    y, fits = torch.randn(6, 1), []
    for method in ("lsmr", "dual", "svd"):
        lin = jacpot.linearize(net)
        fits.append(lin.fit(x, y, ridge=0.5, method=method, tol=1e-9).raise_if_failed().x)
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fits[0], fits[2], rtol=1e-5, atol=1e-6)


def test_columns_in_another_order_are_written_out_in_it():
    net, x = networks()["columns in another order"]
    jacobian = jacpot.jacobian(net, x)
    operator = jacobian.to_operator()
    assert isinstance(operator, OrderedOperator)
    torch.testing.assert_close(operator.dense(), jacobian.dense().flatten(0, 1))
    torch.testing.assert_close(operator.T.dense(), jacobian.dense().flatten(0, 1).T)
    assert operator.double().dtype == torch.float64
