"""Around the squared-loss fit: ridge choice, weights, flow, leave-one-out, posterior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import jacpot
from jacpot.tangent import operators


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(n=12, outputs=2, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, outputs)).double()
    x = torch.randn(n, 3, dtype=torch.float64)
    return net, x, torch.randn(n, outputs, dtype=torch.float64)


def dense(net, x):
    j = jacpot.jacobian(net, x)
    return j.dense().flatten(0, 1), j.outputs


RIDGE = 0.2


def fitted(**options):
    net, x, y = problem()
    lin = jacpot.linearize(net)
    return lin, lin.fit(x, y, **{"ridge": RIDGE, "tol": 1e-12, **options}), x, y


def test_gradient_flow_is_the_ordinary_differential_equation():
    lin, fit, x, y = fitted()
    j, f = dense(lin.base, x)
    r = (y - f).reshape(-1)
    delta, steps, end = torch.zeros(j.shape[1], dtype=torch.float64), 4000, 0.7
    h = end / steps

    def rate(d):
        return j.T @ (r - j @ d) - RIDGE * d

    for _ in range(steps):  # Runge-Kutta 4
        k1 = rate(delta)
        k2 = rate(delta + h / 2 * k1)
        k3 = rate(delta + h / 2 * k2)
        delta = delta + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(delta + h * k3))
    got = fit.problem.columns.flatten(fit.at(end))
    assert (got - delta).norm() <= 1e-9 * delta.norm()


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_the_end_of_the_flow_is_the_fit(ridge):
    _, fit, _, _ = fitted(ridge=ridge, method="svd")
    columns = fit.problem.columns
    for time in (math.inf, 1e12):
        torch.testing.assert_close(columns.flatten(fit.at(time)), fit.x, rtol=1e-7, atol=1e-8)
    assert not columns.flatten(fit.at(0.0)).any()


def test_early_stopping_takes_the_best_time():
    lin, fit, _, _ = fitted(ridge=0.0)
    new, wanted = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    times = [0.0, 0.01, 0.1, 1.0, 10.0]
    best, delta = fit.early_stopped(new, wanted, times)
    errors = []
    for time in times:
        lin.set_delta(fit.at(time))
        errors.append(float((lin(new).detach() - wanted).square().sum()))
    assert best == times[errors.index(min(errors))]
    lin.set_delta(delta)
    assert float((lin(new).detach() - wanted).square().sum()) == pytest.approx(min(errors))
    assert fit.early_stopped(new, wanted)[0] >= 0


def refits(x, y, net, ridge=RIDGE):
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        lin = jacpot.linearize(net)
        lin.fit(x[keep], y[keep], ridge=ridge, tol=1e-12).raise_if_failed()
        yield i, lin


def test_leave_one_out_and_influence_are_refits():
    lin, fit, x, y = fitted()
    new = torch.randn(4, 3, dtype=torch.float64)
    errors, influence, here = fit.leave_one_out(), fit.influence(new), lin(new)
    for i, other in refits(x, y, lin.base):
        torch.testing.assert_close(errors[i], (y - other(x))[i], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(influence[:, :, i], other(new) - here, rtol=1e-6, atol=1e-8)


def test_scores_are_their_formulas():
    lin, fit, x, y = fitted()
    j, f = dense(lin.base, x)
    r, n = (y - f).reshape(-1), f.numel()
    total = j @ j.T + RIDGE * torch.eye(n, dtype=torch.float64)
    keep = RIDGE * torch.linalg.inv(total)
    assert fit.gcv() == pytest.approx(float(n * (keep @ r).square().sum() / keep.trace() ** 2))
    normal = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=torch.float64), total)
    assert fit.log_marginal_likelihood() == pytest.approx(float(normal.log_prob(r)))


@pytest.mark.parametrize("criterion", ["gcv", "loo", "evidence", "validation"])
def test_the_ridge_is_the_best_of_the_candidates(criterion):
    net, x, y = problem()
    ridges = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    other = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    lin = jacpot.linearize(net)
    chosen = lin.fit(x, y, ridge=criterion, ridges=ridges, validation=other, tol=1e-10)
    assert chosen.converged
    scores = []
    for ridge in ridges:
        fit = lin.fit(x, y, ridge=ridge, tol=1e-10)
        score = {
            "gcv": fit.gcv,
            "loo": lambda fit=fit: float(fit.leave_one_out().square().mean()),
            "evidence": lambda fit=fit: -fit.log_marginal_likelihood(),
            "validation": lambda: float((lin(other[0]).detach() - other[1]).square().sum()),
        }[criterion]
        scores.append(score())
    assert chosen.ridge == ridges[scores.index(min(scores))]
    assert jacpot.linearize(net).fit(x, y, ridge=criterion, validation=other).ridge > 0


def test_weights_are_repetitions():
    net, x, y = problem()
    weights = torch.ones(12)
    weights[3], weights[5] = 2.0, 0.0
    one, two = jacpot.linearize(net), jacpot.linearize(net)
    again = [i for i in range(12) if i != 5] + [3]
    for method in ("dual", "primal"):
        one.fit(x, y, ridge=RIDGE, weights=weights, method=method, tol=1e-12)
        two.fit(x[again], y[again], ridge=RIDGE, method=method, tol=1e-12)
        torch.testing.assert_close(one(x), two(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["dual", "primal", "lsmr"])
@pytest.mark.parametrize("preconditioner", ["auto", None])
def test_batches_of_factors_give_the_same_fit(method, preconditioner):
    net, x, y = problem()
    one, two = jacpot.linearize(net), jacpot.linearize(net)
    options = {"method": method, "preconditioner": preconditioner, "tol": 1e-10}
    one.fit(x, y, ridge=RIDGE, **options).raise_if_failed()
    two.fit(x, y, ridge=RIDGE, batch_size=5, **options).raise_if_failed()
    torch.testing.assert_close(one(x), two(x), rtol=1e-7, atol=1e-8)


def test_batches_with_the_trace_kernel():
    net, x, y = problem()
    lin = jacpot.linearize(net)
    fit = lin.fit(x, y, ridge=RIDGE, batch_size=5, method="dual", preconditioner="trace")
    assert "trace" in fit.raise_if_failed().preconditioner


@pytest.mark.parametrize("method", ["dual", "primal"])
def test_warm_start_of_the_same_problem_is_done(method):
    net, x, y = problem()
    lin = jacpot.linearize(net)
    options = {"ridge": RIDGE, "method": method, "preconditioner": None}
    cold = lin.fit(x, y, tol=1e-10, **options)
    warm = lin.fit(x, y, tol=1e-6, warm_start=True, **options)
    assert warm.iterations <= 1 < cold.iterations


def test_refit_with_new_data_is_a_fit_of_all():
    net, x, y = problem()
    lin, fresh = jacpot.linearize(net), jacpot.linearize(net)
    lin.fit(x[:8], y[:8], ridge=RIDGE)
    lin.fit(x, y, ridge=RIDGE, tol=1e-10, warm_start=True).raise_if_failed()
    fresh.fit(x, y, ridge=RIDGE, tol=1e-10)
    torch.testing.assert_close(lin(x), fresh(x), rtol=1e-6, atol=1e-7)


def test_posterior_variance_is_the_dense_formula():
    lin, fit, x, _ = fitted()
    new = torch.randn(5, 3, dtype=torch.float64)
    j, _ = dense(lin.base, x)
    j_new, _ = dense(lin.base, new)
    total = j @ j.T + RIDGE * torch.eye(j.shape[0], dtype=torch.float64)
    cross = j_new @ j.T
    expected = j_new @ j_new.T - cross @ torch.linalg.solve(total, cross.T)
    got = fit.posterior().covariance(new)
    for i in range(5):
        torch.testing.assert_close(
            got[i], expected[2 * i : 2 * i + 2, 2 * i : 2 * i + 2], rtol=1e-6, atol=1e-8
        )
    torch.testing.assert_close(
        fit.posterior().variance(new).reshape(-1), expected.diagonal(), rtol=1e-6, atol=1e-8
    )


def test_samples_have_the_posterior_mean_and_variance():
    lin, fit, _, _ = fitted()
    new = torch.randn(3, 3, dtype=torch.float64)
    mean = lin(new).detach()
    values = []
    posterior = fit.posterior()
    for draw in posterior.sample(600, seed=3):
        lin.set_delta(draw)
        values.append(lin(new).detach())
    values = torch.stack(values)
    variance = posterior.variance(new)
    assert ((values.mean(0) - mean).abs() <= 5 * (variance / 600).sqrt()).all()
    assert ((values.var(0) / variance - 1).abs() < 0.35).all()


def test_questions_that_make_no_sense_are_refused(monkeypatch):
    _, fit, x, y = fitted(ridge=0.0)
    for question in (fit.gcv, fit.leave_one_out, fit.log_marginal_likelihood, fit.posterior):
        with pytest.raises(ValueError, match="ridge"):
            question()
    with pytest.raises(ValueError, match="time"):
        fit.at(-1.0)
    lin = jacpot.linearize(problem()[0])
    with pytest.raises(ValueError, match="squared"):
        lin.fit(x, y.round().clamp(0, 1), loss="logistic", ridge=1.0).at(1.0)
    for options, words in (
        ({"ridge": "guess"}, "guess"),
        ({"ridge": "validation"}, "validation"),
        ({"ridge": "gcv", "loss": "huber"}, "number"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"weights": -torch.ones(12)}, "weights"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=words):
            lin.fit(x, y, **{"ridge": RIDGE, **options})


def test_kernels_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("jacpot.tangent.spectrum.LIMIT", 10)
    _, fit, _, _ = fitted()
    with pytest.raises(ValueError, match="above 10"):
        fit.gcv()


def test_mixing_outputs_is_a_product_from_the_left():
    net, x, _ = problem()
    j = jacpot.jacobian(net, x)
    jacobian = operators.JacobianOperator(j.blocks, 12, 2)
    matrix = torch.randn(12, 2, 2, dtype=torch.float64)
    expected = torch.einsum("nkl,nkp->nlp", matrix, j.dense())
    torch.testing.assert_close(jacobian.mixed(matrix).dense(), expected.flatten(0, 1))
