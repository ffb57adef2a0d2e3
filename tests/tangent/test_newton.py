"""Convex losses and Gauss-Newton: the minimiser, a falling loss, and saturation without harm."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import jacpot
from jacpot.linalg import Interrupted, Status
from jacpot.tangent import objective, quadratic_model
from jacpot.tangent.losses import ConvexLoss, Huber, get_loss


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(outputs=3, width=24, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def inputs(n=30, dtype=torch.float64):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


COSH = ConvexLoss(
    value=lambda f, y: torch.cosh(f - y).sum(1),
    gradient=lambda f, y: torch.sinh(f - y),
    hessian=lambda f, y: torch.diag_embed(torch.cosh(f - y)),
)


def targets(loss, n=30):
    generator = torch.Generator().manual_seed(2)
    if loss == "cross_entropy":
        return torch.randint(0, 3, (n,), generator=generator)
    y = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return 4 * y if loss == "huber" else y


LOSSES = ["mse", "cross_entropy", "logistic", "huber", COSH]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss if isinstance(loss, str) else "cosh")
def test_gradient_and_root_are_the_derivatives(loss):
    chosen = get_loss(loss)
    f = torch.randn(30, 3, dtype=torch.float64)
    y = chosen.check(targets(loss), f)

    def total(g):
        return chosen.value(g, y).sum()

    torch.testing.assert_close(chosen.gradient(f, y), torch.func.grad(total)(f))
    hessian = torch.func.jacrev(torch.func.grad(total))(f)
    root = chosen.root(f, y)
    for n in range(30):
        torch.testing.assert_close(root[n] @ root[n].T, hessian[n, :, n])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss if isinstance(loss, str) else "cosh")
@pytest.mark.parametrize("method", ["dual", "primal"])
@pytest.mark.parametrize("ridge", [1.0, 1e-3])
def test_the_gradient_vanishes_and_the_loss_falls(loss, method, ridge):
    net, x, y = network(), inputs(), targets(loss)
    lin = jacpot.linearize(net)
    fit = lin.fit(x, y, loss=loss, ridge=ridge, method=method, tol=1e-9)
    assert fit.converged, str(fit)
    chosen = get_loss(loss)
    total = chosen.value(lin(x), chosen.check(y, lin(x).detach())).sum()
    total = total + 0.5 * ridge * sum(p.square().sum() for p in lin.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, lin.parameters())])
    assert gradient.norm() <= 1e-7
    if "loss" in fit.details:
        losses = fit.details["loss"]
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert losses[-1] == pytest.approx(float(total.detach()), rel=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "logistic"])
def test_newton_matches_the_direct_fit_of_the_squared_loss_and_weights(loss):
    net, x, y = network(), inputs(), targets(loss)
    weights = torch.ones(30)
    weights[4] = 2.0
    one, two = jacpot.linearize(net), jacpot.linearize(net)
    one.fit(x, y, loss=loss, ridge=0.1, weights=weights, tol=1e-10).raise_if_failed()
    again = [*range(30), 4]
    two.fit(x[again], y[again], loss=loss, ridge=0.1, tol=1e-10).raise_if_failed()
    torch.testing.assert_close(one(x), two(x), rtol=1e-6, atol=1e-7)


def test_saturated_probabilities_do_no_harm():
    net = network()
    with torch.no_grad():
        net[2].weight.mul_(1e4)
    fit = jacpot.linearize(net).fit(inputs(), targets("cross_entropy"), "cross_entropy", ridge=1.0)
    assert fit.status in (Status.converged, Status.stagnated)
    assert torch.isfinite(fit.x).all()
    assert fit.details["loss"][-1] < 0.01 * fit.details["loss"][0]


def test_float32_networks():
    net = network(dtype=torch.float32)
    lin = jacpot.linearize(net)
    fit = lin.fit(inputs(dtype=torch.float32), targets("cross_entropy"), "cross_entropy", ridge=0.1)
    assert fit.converged, str(fit)


def test_warm_start_and_callback_and_limit():
    net, x, y = network(), inputs(), targets("cross_entropy")
    lin = jacpot.linearize(net)
    assert lin.fit(x, y, "cross_entropy", ridge=0.1, max_iter=1).status is Status.iteration_limit
    lin.fit(x, y, "cross_entropy", ridge=0.1, tol=1e-8)
    assert lin.fit(x, y, "cross_entropy", ridge=0.1, tol=1e-6, warm_start=True).iterations == 0
    stopped = jacpot.linearize(net).fit(x, y, "cross_entropy", ridge=0.1, callback=lambda *_: False)
    assert stopped.status is Status.interrupted
    assert stopped.iterations == 1


@pytest.mark.parametrize(
    ("y", "loss", "error"),
    [
        (torch.full((30,), 3), "cross_entropy", ValueError),
        (torch.zeros(29, dtype=torch.int64), "cross_entropy", ValueError),
        (torch.zeros(30, 2, dtype=torch.float64), "cross_entropy", ValueError),
        (torch.full((30, 3), 2.0), "logistic", ValueError),
        (torch.zeros(30, 3, dtype=torch.int64), "huber", TypeError),
        (torch.zeros(30, 3), object(), TypeError),
    ],
)
def test_targets_and_losses_that_do_not_fit(y, loss, error):
    with pytest.raises(error):
        jacpot.linearize(network()).fit(inputs(), y, loss, ridge=0.1)


def test_losses_other_than_the_squared_one_need_a_ridge():
    with pytest.raises(ValueError, match="ridge"):
        jacpot.linearize(network()).fit(inputs(), targets("huber"), "huber")


def test_interrupt_keeps_the_last_step():
    def callback(step, residual, seconds):
        if step == 2:
            raise KeyboardInterrupt

    net, x, y = network(), inputs(), targets("cross_entropy")
    lin, two = jacpot.linearize(net), jacpot.linearize(net)
    with pytest.raises(Interrupted) as info:
        lin.fit(x, y, "cross_entropy", ridge=0.1, callback=callback)
    assert info.value.solution.iterations == 2
    two.fit(x, y, "cross_entropy", ridge=0.1, max_iter=2)
    torch.testing.assert_close(lin(x), two(x))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_gauss_newton_drives_an_underdetermined_network_to_zero(loss):
    net = network(width=64)
    result = jacpot.gauss_newton(net, inputs(), targets(loss), loss, max_steps=60)
    assert all(b < a for a, b in itertools.pairwise(result.losses))
    assert result.losses[-1] < 1e-3 * result.losses[0]
    f = net(inputs()).detach()
    chosen = get_loss(loss)
    value = float(chosen.value(f, chosen.check(targets(loss), f)).mean())
    assert value == pytest.approx(result.losses[-1], rel=1e-6)


def test_gauss_newton_converges_on_an_overdetermined_network():
    net = network(width=3)
    result = jacpot.gauss_newton(net, inputs(200), targets("mse", 200), tol=1e-4, max_steps=300)
    assert result.converged, result
    assert result.gradient_norm <= 1e-4


def test_gauss_newton_in_batches_and_under_a_mask():
    net = network(width=64)
    mask = {"0.weight": torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) < 0.5}
    result = jacpot.gauss_newton(
        net, inputs(), targets("mse"), batch_size=10, mask=mask, max_steps=40
    )
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert not net[0].weight[~mask["0.weight"]].any()


def test_gauss_newton_stops_when_told():
    net = network()
    result = jacpot.gauss_newton(net, inputs(), targets("mse"), callback=lambda *_: False)
    assert result.status is Status.interrupted
    assert result.steps == 1
    for options in (
        {"max_steps": -1},
        {"damping": 0.0},
        {"batch_size": 0},
        {"batch_size": "all"},
        {"inner_iterations": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            jacpot.gauss_newton(net, inputs(), targets("mse"), **options)


@pytest.mark.parametrize("inner_iterations", [1, 4])
def test_gauss_newton_with_kronecker_factors_falls_monotonically(monkeypatch, inner_iterations):
    monkeypatch.setattr(quadratic_model, "DIRECT_SIZE", 0)
    net, x = network(width=64, dtype=torch.float32), inputs(dtype=torch.float32)
    result = jacpot.gauss_newton(
        net, x, targets("cross_entropy"), "cross_entropy", max_steps=60, batch_size=None,
        inner_iterations=inner_iterations,
    )  # fmt: skip
    assert all(b < a for a, b in itertools.pairwise(result.losses))
    assert result.losses[-1] < 1e-2 * result.losses[0]
    assert result.inner_iterations == inner_iterations * result.steps


def test_the_parabola_of_the_huber_loss_touches_it_and_lies_above():
    huber = Huber(delta=0.7)
    f, y = torch.linspace(-5, 5, 101).double()[:, None], torch.zeros(101, 1).double()
    slope, root = huber.gradient(f, y), huber.majorant_root(f, y)[:, :, 0]
    for at in torch.linspace(-6, 6, 121).double():
        d = at - f
        parabola = huber.value(f, y)[:, None] + slope * d + 0.5 * (root * d).square()
        assert bool((parabola[:, 0] >= huber.value(f + d, y) - 1e-12).all())


def test_gauss_newton_crosses_the_linear_part_of_the_huber_loss():
    net, x = network(outputs=1, width=64), inputs(100)
    y = 30 * torch.sin(x[:, :1]) + 20 * x[:, 1:2]
    result = jacpot.gauss_newton(net, x, y, "huber", max_steps=30)
    assert result.losses[-1] < 1e-3 * result.losses[0]


def test_gauss_newton_solves_well_what_is_known_of_all_examples(monkeypatch):
    monkeypatch.setattr(quadratic_model, "DIRECT_SIZE", 0)
    x = inputs(100)
    y = torch.sin(3 * x[:, :3])
    all_of_them = jacpot.gauss_newton(network(width=64), x, y, max_steps=20)
    one = jacpot.gauss_newton(network(width=64), x, y, max_steps=20, inner_iterations=1)
    assert all_of_them.inner_iterations > all_of_them.steps
    assert all_of_them.losses[-1] < one.losses[-1]
    some = jacpot.gauss_newton(network(width=64), x, y, max_steps=20, batch_size=50)
    assert some.inner_iterations == some.steps


def test_gauss_newton_takes_curvature_from_the_examples_that_have_it(monkeypatch):
    monkeypatch.setattr(quadratic_model, "DIRECT_SIZE", 0)
    monkeypatch.setattr(objective, "LEAST", 40)
    counts = []

    class Counted(quadratic_model.QuadraticModel):
        def __init__(self, columns, *rest):
            counts.append(columns.n_examples)
            super().__init__(columns, *rest)

    monkeypatch.setattr(objective, "QuadraticModel", Counted)
    x = inputs(400)
    labels = (x[:, 0] > 0).long()
    net = network(width=64)
    result = jacpot.gauss_newton(net, x, labels, "cross_entropy", max_steps=25, batch_size=None)
    assert all(b < a for a, b in itertools.pairwise(result.losses))
    assert result.losses[-1] < 1e-3 * result.losses[0]
    assert counts[0] > 350  # all are fitted alike badly
    assert counts[-1] < 100


def test_gauss_newton_grows_its_batches_to_all_examples():
    net, x = network(width=16), inputs(1200)
    y = torch.sin(3 * x[:, :3])
    result = jacpot.gauss_newton(net, x, y, max_steps=60)
    assert result.batch_size == 1200
    value = 0.5 * (net(x).detach() - y).square().sum(1).mean()
    assert float(value) == pytest.approx(result.losses[-1], rel=1e-6)
    again = network(width=16)
    assert jacpot.gauss_newton(again, x, y, max_steps=60).losses == result.losses


def test_gauss_newton_keeps_the_last_step_when_interrupted():
    taken = []

    def callback(step, loss, seconds):
        taken.append(net[0].weight.detach().clone())
        if step == 3:
            raise KeyboardInterrupt

    net = network()
    with pytest.raises(KeyboardInterrupt):
        jacpot.gauss_newton(net, inputs(), targets("mse"), callback=callback)
    assert len(taken) == 3
    assert torch.equal(net[0].weight, taken[-1])


@pytest.mark.parametrize(
    ("y", "loss", "error"),
    [
        (torch.zeros(30, 3, dtype=torch.int64), "mse", TypeError),
        (torch.zeros(30, 2, dtype=torch.float64), "mse", ValueError),
        (torch.zeros(29, 3, dtype=torch.float64), "mse", ValueError),
        (torch.tensor([[0.0]] * 29 + [[float("nan")]]).double().expand(30, 3), "mse", ValueError),
        (torch.tensor([0] * 29 + [3]), "cross_entropy", ValueError),
        ([0.0] * 30, "mse", TypeError),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_gauss_newton_leaves_the_network_alone_when_it_refuses_targets(y, loss, error, batch_size):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mask = {"0.weight": torch.zeros(24, 4, dtype=torch.bool)}
    with pytest.raises(error, match="'y'"):
        jacpot.gauss_newton(net, inputs(), y, loss, mask=mask, batch_size=batch_size)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_gauss_newton_keeps_the_last_step_when_examples_cannot_be_used():
    net, x = network(), inputs()
    x[25:] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        jacpot.gauss_newton(net, x, targets("mse"), batch_size=5)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_gauss_newton_where_there_is_nothing_to_do():
    net = network()
    y = net(inputs()).detach()
    assert jacpot.gauss_newton(net, inputs(), y).converged
    assert jacpot.gauss_newton(net, inputs(0), y[:0]).converged
    pruned = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    assert jacpot.gauss_newton(net, inputs(), targets("mse"), mask=pruned).converged


def test_gauss_newton_from_saturated_probabilities():
    net = network(dtype=torch.float32)
    with torch.no_grad():
        net[2].weight.mul_(1e4)
    x, y = inputs(dtype=torch.float32), targets("cross_entropy")
    result = jacpot.gauss_newton(net, x, y, "cross_entropy", max_steps=60)
    assert result.losses[-1] < 0.01 * result.losses[0]


@pytest.mark.parametrize(
    "mask",
    [
        {"0.weight": torch.full((8, 3), 0.5)},
        {"0.weight": torch.ones(2, 2, dtype=torch.bool)},
        {"0.bias": torch.zeros(8, dtype=torch.bool), "9.weight": torch.ones(1, dtype=torch.bool)},
    ],
)
def test_gauss_newton_leaves_the_network_alone_when_it_refuses(mask):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match="'mask'"):
        jacpot.gauss_newton(net, torch.randn(5, 3), torch.randn(5, 1), mask=mask)
    good = {"0.bias": torch.zeros(8, dtype=torch.bool)}
    with pytest.raises(ValueError, match="batch_size"):
        jacpot.gauss_newton(net, torch.randn(5, 3), torch.randn(5, 1), mask=good, batch_size=0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
