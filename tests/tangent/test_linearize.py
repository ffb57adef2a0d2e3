"""The linearized network: its forward, its training, and the squared-loss fit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import jacpot
from jacpot.linalg import Interrupted


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # systems this small only wait for a second one
    yield
    torch.set_num_threads(threads)


def network(widths=(5, 16, 3), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def problem(n, inputs=5, outputs=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=dtype)
    return x, torch.randn(n, outputs, generator=generator, dtype=dtype)


def dense_jacobian(module, x):
    """J (N·K, P) in the order of ``named_parameters``, and the outputs."""
    point = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters, one):
        return torch.func.functional_call(module, parameters, (one[None],))[0]

    parts = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(point, x)
    n = x.shape[0]
    f = module(x).detach()
    return torch.cat([parts[name].reshape(n * f.shape[1], -1) for name in point], dim=1), f


def flat(delta, module):
    return torch.cat([delta[name].reshape(-1) for name, _ in module.named_parameters()])


def test_forward_is_the_network_plus_a_directional_derivative():
    net = network()
    x, _ = problem(7)
    lin = jacpot.linearize(net)
    torch.testing.assert_close(lin(x), net(x))
    delta = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    lin.set_delta(delta)
    j, f = dense_jacobian(net, x)
    expected = f + (j @ flat(delta, net)).reshape(f.shape)
    torch.testing.assert_close(lin(x), expected)


def test_the_expansion_point_does_not_move_with_the_module():
    net = network()
    x, _ = problem(4)
    lin, before = jacpot.linearize(net), net(x).detach()
    with torch.no_grad():
        net[0].weight.zero_()
    torch.testing.assert_close(lin(x), before)


@pytest.mark.parametrize("method", ["auto", "dual", "primal", "lsmr", "svd"])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_fit_is_the_closed_form(method, n, dtype):
    net = network(dtype=dtype)
    x, y = problem(n, dtype=dtype)
    lin = jacpot.linearize(net)
    solution = lin.fit(x, y, ridge=0.3, method=method, tol=1e-12).raise_if_failed()
    j, f = dense_jacobian(net, x)
    j, r = j.double(), (y - f).double().reshape(-1)
    expected = torch.linalg.solve(
        j.T @ j + 0.3 * torch.eye(j.shape[1], dtype=torch.float64), j.T @ r
    )
    bound = 1e-8 if dtype == torch.float64 else 2e-5
    assert (flat(lin.delta, net).double() - expected).norm() <= bound * expected.norm()
    assert solution.x.dtype == torch.float64


@pytest.mark.parametrize("method", ["auto", "lsmr"])
@pytest.mark.parametrize("case", ["wide", "tall", "duplicates", "conflict", "one"])
def test_without_a_ridge_it_is_the_least_norm_solution(method, case):
    net = network()
    x, y = problem({"wide": 10, "tall": 120, "one": 1}.get(case, 12))
    if case in ("duplicates", "conflict"):
        x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5] + (1.0 if case == "conflict" else 0.0)])
    lin = jacpot.linearize(net)
    lin.fit(x, y, ridge=0.0, method=method, tol=1e-13, max_iter=20_000)
    j, f = dense_jacobian(net, x)
    expected = torch.linalg.lstsq(j, (y - f).reshape(-1, 1), driver="gelsd", rcond=1e-13).solution
    got = flat(lin.delta, net)
    if method == "lsmr":
        fitted, wanted = j @ got, (j @ expected)[:, 0]
        assert (fitted - wanted).norm() <= 1e-8 * wanted.norm()
    else:
        assert (got - expected[:, 0]).norm() <= 1e-9 * expected.norm()


def test_weight_space_and_function_space_agree():
    net = network()
    x, y = problem(20)
    new, _ = problem(9, seed=3)
    lin = jacpot.linearize(net)
    solution = lin.fit(x, y, ridge=0.1, method="dual", tol=1e-13)
    j, _ = dense_jacobian(net, x)
    j_new, f_new = dense_jacobian(net, new)
    function_space = f_new + (j_new @ (j.T @ solution.details["dual"])).reshape(f_new.shape)
    assert (lin(new) - function_space).norm() <= 1e-10 * function_space.norm()


def test_pruned_weights_do_not_move_and_count_for_nothing():
    net = network()
    generator = torch.Generator().manual_seed(5)
    mask = {
        name: torch.rand(p.shape, generator=generator) < 0.4
        for name, p in net.named_parameters()
        if p.ndim == 2
    }
    x, y = problem(12)
    lin = jacpot.linearize(net, mask)
    lin.fit(x, y, ridge=0.2, tol=1e-12).raise_if_failed()
    for name, kept in mask.items():
        assert not lin.delta[name][~kept].any()
    pruned = network()
    with torch.no_grad():
        for name, kept in mask.items():
            pruned.get_parameter(name).mul_(kept)
    torch.testing.assert_close(lin.base(x), pruned(x))
    j, f = dense_jacobian(pruned, x)
    keep = torch.cat(
        [
            mask.get(name, torch.ones_like(p, dtype=torch.bool)).reshape(-1)
            for name, p in net.named_parameters()
        ]
    )
    j = j[:, keep]
    expected = torch.linalg.solve(
        j.T @ j + 0.2 * torch.eye(j.shape[1], dtype=torch.float64), j.T @ (y - f).reshape(-1)
    )
    torch.testing.assert_close(flat(lin.delta, net)[keep], expected, rtol=1e-8, atol=1e-9)


def test_everything_pruned_leaves_the_network_as_it_is():
    net = network()
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    x, y = problem(6)
    lin = jacpot.linearize(net, mask)
    assert lin.fit(x, y, ridge=0.1).converged
    assert not any(value.any() for value in lin.delta.values())


def test_one_output_takes_flat_targets():
    net = network((5, 16, 1))
    x, y = problem(6, outputs=1)
    one, two = jacpot.linearize(net), jacpot.linearize(net)
    one.fit(x, y[:, 0], ridge=0.1)
    two.fit(x, y, ridge=0.1)
    torch.testing.assert_close(one(x), two(x))


def test_no_examples_leave_the_network_as_it_is():
    net = network()
    x, y = problem(0)
    lin = jacpot.linearize(net)
    assert lin.fit(x, y, ridge=0.1).converged
    assert not any(value.any() for value in lin.delta.values())


def test_an_optimizer_reaches_the_fit():
    net = network()
    x, y = problem(6)
    trained, fitted = jacpot.linearize(net), jacpot.linearize(net)
    names = dict(trained.named_parameters())
    assert len(names) == len(dict(net.named_parameters()))
    optimizer = torch.optim.LBFGS(
        trained.parameters(),
        max_iter=300,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
    )

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (trained(x) - y).square().sum()
        loss = loss + 0.5 * sum(p.square().sum() for p in trained.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted.fit(x, y, ridge=1.0, tol=1e-10)
    torch.testing.assert_close(trained(x), fitted(x), rtol=1e-5, atol=1e-5)


def test_interrupt_keeps_what_was_reached():
    net = network((5, 64, 3))
    x, y = problem(40)

    def callback(iteration, residual, seconds):
        if iteration == 15:
            raise KeyboardInterrupt

    lin = jacpot.linearize(net)
    before = (lin(x) - y).norm()
    with pytest.raises(Interrupted):
        lin.fit(x, y, ridge=3.0, callback=callback, preconditioner=None, tol=1e-12)
    assert (lin(x) - y).norm() < before


def test_progress_draws_and_calls_back(capsys):
    net = network()
    x, y = problem(10)
    seen = []
    jacpot.linearize(net).fit(
        x, y, ridge=0.1, progress=True, callback=lambda *a: seen.append(a), preconditioner=None
    )
    assert seen


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": "mystery"}, ValueError, "loss"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"ridge": float("nan")}, ValueError, "ridge"),
        ({"method": "magic"}, ValueError, "method"),
        ({"method": "dual"}, ValueError, "ridge"),
        ({"y": torch.zeros(6, dtype=torch.int64)}, TypeError, "one_hot"),
        ({"y": torch.zeros(5, 3, dtype=torch.float64)}, ValueError, "argument 'y'"),
        ({"y": torch.full((6, 3), float("nan"), dtype=torch.float64)}, ValueError, "finite"),
        ({"y": [1.0]}, TypeError, "argument 'y'"),
    ],
)
def test_refusals(change, error, words):
    x, y = problem(6)
    with pytest.raises(error, match=words):
        jacpot.linearize(network()).fit(**{"x": x, "y": y, **change})


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ({"nothing": torch.ones(2, dtype=torch.bool)}, ValueError),
        ({"0.weight": torch.ones(16, 5)}, TypeError),
        ({"0.weight": torch.ones(5, 16, dtype=torch.bool)}, ValueError),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, error):
    with pytest.raises(error, match="mask"):
        jacpot.linearize(network(), mask)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        jacpot.linearize(nn.ReLU())


def test_a_saved_state_is_the_same_function_in_another_linearization(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).eval()

    torch.manual_seed(0)
    x, y, net = torch.randn(10, 3), torch.randn(10, 2), network()
    mask = {"0.weight": torch.rand(8, 3) < 0.5}
    lin, other = jacpot.linearize(net, mask), jacpot.linearize(network())
    lin.fit(x, y, ridge=0.1)
    torch.save(lin.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), lin(x))
    assert torch.equal(other.mask["0.weight"], mask["0.weight"])
    with pytest.raises((RuntimeError, ValueError)):
        jacpot.linearize(nn.Linear(3, 2)).load_state_dict(lin.state_dict())
