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


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("columns", [(), (3,)])
def test_damping_goes_by_the_smaller_square_system(name, columns):
    """Where that is accurate; what converged means is LSMR's to say."""
    net, x = networks()[name]
    jacobian = jacpot.jacobian(net, x)
    dense = jacobian.to_operator().double().dense()
    b = torch.randn(len(dense), *columns)
    wide = dense.shape[0] <= dense.shape[1]
    for tol in (1e-4, 1e-9):
        solution = jacpot.solve(jacobian, b, damping=0.2, tol=tol).raise_if_failed()
        assert solution.method.startswith("cg on A Aᵀ" if wide else "cg on Aᵀ A")
        assert solution.preconditioner.startswith("auto: cholesky")
        r = b.double() - dense @ solution.x
        size = torch.hypot(r.norm(dim=0), 0.2**0.5 * solution.x.norm(dim=0))
        normal = (dense.T @ r - 0.2 * solution.x).norm(dim=0)
        norm_a = torch.hypot(torch.linalg.matrix_norm(dense, 2), torch.tensor(0.2**0.5))
        assert (normal <= 1.01 * tol * norm_a * size).all()
    by_lsmr = jacpot.solve(jacobian, b, damping=0.2, method="lsmr", tol=1e-9)
    torch.testing.assert_close(solution.x, by_lsmr.x, rtol=1e-6, atol=1e-7)
    again = jacpot.solve(jacobian, b, damping=0.2, tol=1e-7, x0=solution.x)
    torch.testing.assert_close(again.x, solution.x, rtol=1e-5, atol=1e-6)


def test_little_damping_is_not_squared():
    net, x = networks()["linear"]
    jacobian, b = jacpot.jacobian(net, x), torch.ones(6)
    for damping in (0.0, 1e-12):
        solution = jacpot.solve(jacobian, b, damping=damping, tol=1e-8).raise_if_failed()
        assert solution.method == "lsmr"


def test_a_square_system_that_is_stopped():
    net, x = networks()["linear"]
    jacobian, b = jacpot.jacobian(net, x), torch.ones(6).numpy()
    solution = jacpot.solve(jacobian, b, damping=1.0, tol=1e-12, callback=lambda *_: False)
    assert solution.status is jacpot.linalg.Status.interrupted
    assert type(solution.x) is type(b)

    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    with pytest.raises(jacpot.linalg.Interrupted) as stop:
        jacpot.solve(jacobian, b, damping=1.0, callback=press_ctrl_c)
    assert stop.value.solution.x.shape == (12,)
