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
    with pytest.raises(ValueError, match="times"):
        fit.early_stopped(new, wanted, [])
    with pytest.raises(ValueError, match="times"):
        fit.early_stopped(new, wanted, [1.0, -1.0])


def test_early_stopping_looks_along_the_whole_flow_by_itself():
    """Its own times are as good as a much finer grid, and beat both ends."""
    lin, fit, _, _ = fitted(ridge=0.0)
    torch.manual_seed(5)
    new, wanted = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)

    def error(delta):
        lin.set_delta(delta)
        return float((lin(new).detach() - wanted).square().sum())

    best, delta = fit.early_stopped(new, wanted)
    assert error(delta) == pytest.approx(error(fit.at(best)))
    finest = min(error(fit.at(time)) for time in torch.logspace(-6, 8, 300).tolist())
    assert error(delta) <= 1.01 * finest
    assert error(delta) <= min(error(fit.at(0.0)), error(fit.at(math.inf)))


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
    with pytest.raises(ValueError, match="only a fit with loss='mse'"):
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
    with pytest.raises(ValueError, match="up to N·K = 10, got N·K = 24"):
        fit.gcv()


def test_mixing_outputs_is_a_product_from_the_left():
    net, x, _ = problem()
    j = jacpot.jacobian(net, x)
    jacobian = operators.JacobianOperator(j.blocks, 12, 2)
    matrix = torch.randn(12, 2, 2, dtype=torch.float64)
    expected = torch.einsum("nkl,nkp->nlp", matrix, j.dense())
    torch.testing.assert_close(jacobian.mixed(matrix).dense(), expected.flatten(0, 1))


@pytest.mark.parametrize("criterion", ["gcv", "loo", "evidence", "validation"])
def test_the_order_of_the_candidates_does_not_matter(criterion):
    net, x, y = problem()
    other = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    options = {"ridge": criterion, "validation": other}
    lin, ridges = jacpot.linearize(net), [1e-3, 1.0, 10.0]
    chosen = {lin.fit(x, y, ridges=r, **options).ridge for r in (ridges, ridges[::-1])}
    assert len(chosen) == 1
    for wrong in ([], [-1.0, 1.0], [math.nan, 1.0], [math.inf]):
        with pytest.raises(ValueError, match="'ridges' must"):
            lin.fit(x, y, ridges=wrong, **options)
    with_zero = [[0.0, *ridges], [*ridges, 0.0]]
    if criterion == "validation":  # zero is the least norm
        assert len({lin.fit(x, y, ridges=r, **options).ridge for r in with_zero}) == 1
        return
    for wrong in with_zero:
        with pytest.raises(ValueError, match="'ridges' must be finite and positive"):
            lin.fit(x, y, ridges=wrong, **options)


def test_leave_one_out_of_a_weighted_fit_is_in_the_units_of_y():
    net, x, y = problem()
    weights = torch.linspace(0.1, 4.0, 12, dtype=torch.float64)
    weights[3] = 0.0
    lin, new = jacpot.linearize(net), torch.randn(4, 3, dtype=torch.float64)
    fit = lin.fit(x, y, ridge=RIDGE, weights=weights, tol=1e-12)
    errors, influence, here = fit.leave_one_out(), fit.influence(new), lin(new).detach()
    for i in range(12):
        keep = torch.arange(12) != i
        other = jacpot.linearize(net)
        other.fit(x[keep], y[keep], ridge=RIDGE, weights=weights[keep], tol=1e-12)
        torch.testing.assert_close(errors[i], (y - other(x))[i], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(influence[:, :, i], other(new) - here, rtol=1e-6, atol=1e-8)


def test_questions_at_no_inputs():
    _, fit, x, _ = fitted()
    assert fit.posterior().variance(x[:0]).shape == (0, 2)
    assert fit.posterior().covariance(x[:0]).shape == (0, 2, 2)
    assert fit.influence(x[:0]).shape == (0, 2, 12)
    assert fit.posterior().sample(0) == []
    for wrong, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="'count' must"):
            fit.posterior().sample(wrong)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ridge": None}, TypeError, "'ridge' must be a number, got NoneType"),
        ({"ridge": [0.1]}, TypeError, "'ridge' must be a number, got list"),
        ({"ridge": -1.0}, ValueError, "'ridge' must be finite and at least 0"),
        ({"tol": -1.0}, ValueError, "'tol' must"),
        ({"tol": math.nan}, ValueError, "'tol' must"),
        ({"max_iter": -1}, ValueError, "'max_iter' must"),
        ({"max_iter": 1.5}, TypeError, "'max_iter' must"),
        ({"method": "foo"}, ValueError, "'method' must be one of"),
        ({"preconditioner": "foo"}, ValueError, "'auto', 'diagonal', 'kronecker', .*'trace'"),
    ],
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_arguments_are_checked_whatever_the_loss(loss, options, error, words):
    net, x, y = problem()
    y = y.softmax(1)
    with pytest.raises(error, match=words):
        jacpot.linearize(net).fit(x, y, loss=loss, **{"ridge": RIDGE, **options})


@pytest.mark.parametrize("method", ["lsmr", "svd"])
def test_methods_of_the_squared_loss_are_refused_for_others(method):
    net, x, y = problem()
    with pytest.raises(ValueError, match="for losses other than 'mse'"):
        jacpot.linearize(net).fit(x, y, loss="huber", ridge=RIDGE, method=method)


def test_negative_probabilities_are_refused():
    net, x, y = problem()
    with pytest.raises(ValueError, match="'y' must hold probabilities of at least 0"):
        jacpot.linearize(net).fit(x, y, loss="cross_entropy", ridge=RIDGE)


def test_a_long_solution_has_a_short_repr():
    _, fit, _, _ = fitted()
    for solution in (fit, jacpot.solve(torch.eye(500), torch.ones(500))):
        assert len(repr(solution)) < 500
        assert "tensor" not in repr(solution)
