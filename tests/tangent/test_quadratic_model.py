"""The quadratic model of a loss against its dense matrix, and the batches it is taken on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jacpot
from jacpot.tangent import quadratic_model
from jacpot.tangent.batches import Batches, sample
from jacpot.tangent.losses import get_loss
from jacpot.tangent.quadratic_model import QuadraticModel


def model(loss="cross_entropy", n=12):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(n, 4).double(), torch.randint(0, 3, (n,))
    y = y if loss == "cross_entropy" else torch.randn(n, 3).double()
    columns, chosen = jacpot.jacobian(net, x), get_loss(loss)
    f, targets = columns.outputs, chosen.check(y, columns.outputs)
    gradient = columns.unflatten(columns.T @ chosen.gradient(f, targets) / n)
    value = float(chosen.value(f, targets).mean())
    generator = torch.Generator().manual_seed(0)

    def above(change):
        rise = chosen.value(f + change, targets).mean() - value
        return float(rise - (chosen.gradient(f, targets) * change).sum(1).mean())

    return QuadraticModel(columns, chosen.root(f, targets), gradient, value, above, generator)


def matrix(at):
    rows = at.operator.dense().double().reshape(at.n, -1, at.operator.shape[1])
    rows = (at.root.mT @ rows).flatten(0, 1)
    return rows.T @ rows / at.n


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_with_all_directions_the_minimum_is_the_damped_newton_step(loss):
    at, damping = model(loss), 0.01
    for direction in torch.eye(at.operator.shape[1]).double():
        at.widen(direction)
    step, decrease = at.minimise(damping)
    dense = matrix(at)
    torch.testing.assert_close(dense @ step + damping * step, -at.gradient)
    expected = -(at.gradient @ step + 0.5 * step @ dense @ step)
    assert decrease == pytest.approx(float(expected))
    assert at.residual(damping).norm() < 1e-9


def test_residual_and_dependent_directions():
    at, damping = model(), 0.1
    at.widen(-at.gradient)
    once = at.minimise(damping)
    residual = at.residual(damping)
    torch.testing.assert_close(
        residual, -at.gradient - matrix(at) @ once[0] - damping * once[0], rtol=1e-9, atol=1e-12
    )
    assert abs(residual @ at.gradient) < 1e-12  # Galerkin's condition
    at.widen(1e-9 * at.gradient)
    at.widen(torch.zeros_like(at.gradient))
    torch.testing.assert_close(at.minimise(damping)[0], once[0])


def test_preconditioner_is_the_inverse_where_the_system_is_small():
    at = model()
    r = torch.randn(at.operator.shape[1]).double()
    z = at.preconditioner(0.1)(r)
    torch.testing.assert_close(matrix(at) @ z + 0.1 * z, r, rtol=0, atol=0.05)


def test_conjugate_gradients_with_kronecker_factors(monkeypatch):
    monkeypatch.setattr(quadratic_model, "DIRECT_SIZE", 0)
    damping, decreases = 1e-3, {}
    for name, count in (("plain", 3), ("factors", 3), ("all", 60)):
        at = model(n=200)
        precondition, residual = at.preconditioner(damping), -at.gradient
        for _ in range(count):
            at.widen(residual if name == "plain" else precondition(residual))
            residual = at.residual(damping)
        step, decreases[name] = at.minimise(damping)
    assert decreases["plain"] < decreases["factors"] < decreases["all"]
    assert residual.norm() < 1e-6 * at.gradient.norm()
    torch.testing.assert_close(
        matrix(at) @ step + damping * step, -at.gradient, rtol=1e-4, atol=1e-7
    )


def test_unit_where_the_hessian_vanishes():
    at = model("mse", n=500)
    rows = at.operator.dense().double()
    assert at.unit() >= 0.99 * float(rows.square().sum(1).mean())
    at.root = torch.zeros_like(at.root)
    at._sample = at.operator.mixed(at.root)
    assert at.unit() == pytest.approx(float(at.gradient.square().sum()) / (2 * at.value))


def test_a_step_is_as_long_as_the_linearised_loss_wants():
    damping = 1e-6
    at = model("mse", n=100)  # whose parabola is the loss itself
    at.widen(-at.gradient)
    (direction, decrease), (step, predicted) = at.minimise(damping), at.step(damping)
    torch.testing.assert_close(step, direction)
    assert predicted == pytest.approx(decrease)
    for power in (-2, 1):  # a loss that rises otherwise than its curvature says
        at = model("mse", n=100)
        rises = at._above
        at._above = lambda change, power=power, rises=rises: rises(change) / 2.0**power
        at.widen(-at.gradient)
        step, predicted = at.step(damping)
        torch.testing.assert_close(step, 2.0**power * direction)
        assert predicted == pytest.approx(2.0**power * decrease, rel=1e-4)


def test_a_sample_has_the_large_ones_and_the_mean_of_all():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500).double()
    sizes = torch.rand(500).double() ** 8
    sizes[:5] = 40
    sizes /= sizes.mean()
    sums, seen = [], torch.zeros(500)
    for _ in range(400):
        chosen, weights = sample(sizes, 60, generator)
        assert 60 <= len(chosen) <= 61
        assert len(chosen.unique()) == len(chosen)
        assert set(range(5)) <= set(chosen.tolist())
        sums.append((weights * values[chosen]).mean())
        seen[chosen] += 1
    assert bool(seen.all())
    sums = torch.stack(sums)
    assert abs(sums.mean() - values.mean()) < 4 * sums.std() / 20
    even, weights = sample(torch.ones(500), 100, generator)
    assert len(even.unique()) == len(even)
    torch.testing.assert_close(weights, torch.ones(len(even)))
    assert sample(torch.ones(5), 5, generator)[0] == slice(None)


def batches(n, size):
    return Batches(n, size, torch.Generator().manual_seed(0))


def test_an_epoch_sees_an_example_once():
    source = batches(10, 3)
    for _ in range(3):
        epoch = torch.cat([source.draw() for _ in range(3)])
        assert len(epoch.unique()) == 9
    assert not source.growing
    assert not source.double()


def test_batches_double_until_they_are_all_examples():
    source, sizes = batches(4100, "auto"), []
    while source.growing:
        sizes.append(len(source.draw()))
        assert source.double()
    assert sizes == [500, 1000, 2000]
    assert source.whole
    assert source.draw() == slice(None)
    assert not source.double()


@pytest.mark.parametrize("size", [None, "auto", 7, 9])
def test_few_examples_are_one_batch(size):
    source = batches(7, size)
    assert source.whole
    assert source.draw() == slice(None)
