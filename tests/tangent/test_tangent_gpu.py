"""The tangent space of a network on a GPU: the same numbers as on the CPU, and on that device."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from torch import nn

import jacpot


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()


@pytest.fixture(params=["whole", "masked"])
def both(request):
    """The case with and without its mask."""
    return problem(request.param == "masked")


@pytest.fixture
def case():
    return problem(masked=True)


def problem(masked):
    """A network, a mask or None, inputs and targets."""
    net, mask = network(), None
    if masked:
        mask = jacpot.tickets.prune(jacpot.tickets.score.magnitude(net), density=0.4)
    return net, mask, torch.randn(5, 2, 3, 3).double(), torch.randn(5, 3).double()


def close(got, expected, tolerance=1e-9):
    assert got.device.type == "cuda"
    assert expected.device.type == "cpu"
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_jacobian(both, gpu):
    net, mask, x, _ = both
    here = jacpot.jacobian(net, x, mask=mask)
    there = jacpot.jacobian(copy.deepcopy(net).to(gpu), x.to(gpu), mask=mask)
    v, u = torch.randn(here.shape[1], 2).double(), torch.randn(5, 3, 2).double()
    close(there.outputs, here.outputs)
    close(there @ v.to(gpu), here @ v)
    close(there.T @ u.to(gpu), here.T @ u)
    close(there.dense(), here.dense())
    close(there.row_norms(), here.row_norms())
    close(there.column_norms(), here.column_norms())
    close(there.sketch(11, seed=3), here.sketch(11, seed=3))
    for outputs in ("full", "trace", "diagonal"):
        close(there.gram(outputs=outputs), here.gram(outputs=outputs))
    assert all(part.device.type == "cuda" for part in there.unflatten(v[:, 0].to(gpu)).values())


def test_ntk_in_blocks(case, gpu, tmp_path):
    net, mask, x, _ = case
    expected = jacpot.ntk(net, x, mask=mask)
    moved, x_moved = copy.deepcopy(net).to(gpu), x.to(gpu)
    close(jacpot.ntk(moved, x_moved, mask=mask, batch_size=3), expected)
    on_disk = jacpot.ntk(moved, x_moved, mask=mask, batch_size=3, out=tmp_path / "kernel.npy")
    torch.testing.assert_close(torch.from_numpy(on_disk[:]), expected)
    assert not list(tmp_path.glob("*journal*"))
    host = torch.empty(expected.shape, dtype=expected.dtype)
    assert jacpot.ntk(moved, x_moved, mask=mask, batch_size=3, out=host) is host
    torch.testing.assert_close(host, expected)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("other", [False, True])
def test_ntk_copied_block_by_block(case, gpu, outputs, other):
    """Blocks of different sizes through the same two buffers, one copy behind the other."""
    net, _, x, _ = case
    y = torch.randn(4, 2, 3, 3).double() if other else None
    expected = jacpot.ntk(net, x, y, outputs=outputs)
    host = torch.full(expected.shape, torch.nan).double()
    moved, y_moved = copy.deepcopy(net).to(gpu), None if y is None else y.to(gpu)
    jacpot.ntk(moved, x.to(gpu), y_moved, outputs=outputs, batch_size=2, out=host)
    torch.testing.assert_close(host, expected)


class Failing(nn.Module):
    """Fails on a batch of one example alone."""

    def __init__(self, inner, example):
        super().__init__()
        self.inner, self.fails, self.example = inner, True, example

    def forward(self, x):
        if self.fails and len(x) == 1 and bool((x == self.example).all()):
            raise OSError("the machine went down")
        return self.inner(x)


def test_what_was_not_stored_is_not_in_the_journal(case, gpu, tmp_path):
    net, _, x, _ = case
    path, journal = tmp_path / "kernel.npy", tmp_path / "kernel.npy.jacpot-journal"
    x_moved = x.to(gpu)
    moved = Failing(copy.deepcopy(net), x_moved[-1]).to(gpu)
    with pytest.raises(OSError, match="went down"):
        jacpot.ntk(moved, x_moved, outputs="trace", batch_size=2, out=path)
    stored = torch.from_numpy(numpy.load(path))
    named = [line.split()[:2] for line in journal.read_text().splitlines()[1:]]
    expected = jacpot.ntk(net, x, outputs="trace")
    for i, j in ((int(a), int(b)) for a, b in named):
        here, there = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        torch.testing.assert_close(stored[here, there], expected[here, there])
        torch.testing.assert_close(stored[there, here], expected[there, here])
    moved.fails = False
    jacpot.ntk(moved, x_moved, outputs="trace", batch_size=2, out=path)
    torch.testing.assert_close(torch.from_numpy(numpy.load(path)), expected)
    assert not journal.exists()


@pytest.mark.parametrize(
    ("method", "preconditioner", "ridge"),
    [
        ("auto", "auto", 1.0),
        ("dual", "none", 1.0),
        ("dual", "trace", 1.0),
        ("dual", "nystrom", 1.0),
        ("dual", "partial_cholesky", 1.0),
        ("primal", "kronecker", 1.0),
        ("primal", "diagonal", 1.0),
        ("lsmr", "auto", 1.0),
        ("lsmr", "auto", 0.0),
        ("svd", "auto", 0.0),
    ],
)
def test_fit(case, gpu, method, preconditioner, ridge):
    net, mask, x, y = case
    here, there = jacpot.linearize(net, mask), jacpot.linearize(net, mask).to(gpu)
    options = {"method": method, "preconditioner": preconditioner, "ridge": ridge, "tol": 1e-8}
    expected = here.fit(x, y, **options)
    solution = there.fit(x.to(gpu), y.to(gpu), **options)
    assert expected.converged
    assert solution.converged, str(solution)
    close(solution.x, expected.x, 1e-5)
    close(there(x.to(gpu)).detach(), here(x).detach(), 1e-5)


@pytest.mark.parametrize(
    ("loss", "method"), [("cross_entropy", "dual"), ("logistic", "primal"), ("huber", "dual")]
)
def test_other_losses(case, gpu, loss, method):
    net, mask, x, y = case
    y = y.argmax(1) if loss == "cross_entropy" else (y > 0).double()
    here, there = jacpot.linearize(net, mask), jacpot.linearize(net, mask).to(gpu)
    expected = here.fit(x, y, loss=loss, method=method, ridge=0.1, tol=1e-8)
    solution = there.fit(x.to(gpu), y.to(gpu), loss=loss, method=method, ridge=0.1, tol=1e-8)
    assert solution.converged, str(solution)
    close(solution.x, expected.x, 1e-6)


def test_what_a_fit_can_be_asked(gpu):
    net = network()
    x, y, new = (
        torch.randn(6, 2, 3, 3).double(),
        torch.randn(6, 3).double(),
        torch.randn(2, 2, 3, 3),
    )
    new, weights = new.double(), torch.rand(6).double()
    answers = []
    for device in ("cpu", gpu):
        lin = jacpot.linearize(net).to(device)
        fit = lin.fit(x.to(device), y.to(device), ridge="gcv", weights=weights.to(device))
        posterior = fit.posterior()
        answers.append(
            [
                fit.leave_one_out(),
                fit.influence(new.to(device)),
                posterior.variance(new.to(device)),
                posterior.sample(2)[0]["5.weight"],
                fit.at(1.0)["3.weight"],
                fit.early_stopped(new.to(device), y[:2].to(device))[1]["5.bias"],
                torch.tensor([fit.gcv(), fit.log_marginal_likelihood(), fit.ridge]),
            ]
        )
    for here, there in zip(*answers, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


def test_streamed_factors_and_warm_starts(case, gpu):
    net, mask, x, y = case
    lin = jacpot.linearize(net, mask).to(gpu)
    first = lin.fit(x.to(gpu), y.to(gpu), ridge=0.1, batch_size=2, tol=1e-8)
    again = lin.fit(x.to(gpu), y.to(gpu), ridge=0.1, warm_start=True, tol=1e-7)
    assert first.converged
    assert again.converged
    assert again.iterations == 0


def test_everything_pruned(gpu):
    net = nn.Linear(3, 2, bias=False)
    lin = jacpot.linearize(net, {"weight": torch.zeros(2, 3, dtype=torch.bool)}).to(gpu)
    solution = lin.fit(torch.randn(4, 3).to(gpu), torch.randn(4, 2).to(gpu), ridge=0.1)
    assert solution.x.numel() == 0


def test_gauss_newton(gpu):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y = torch.randn(12, 2), torch.randn(12, 1)
    moved = copy.deepcopy(net).to(gpu)
    result = jacpot.gauss_newton(moved, x.to(gpu), y.to(gpu), max_steps=30)
    assert result.losses[-1] < 0.1 * result.losses[0]
    batched = jacpot.gauss_newton(moved, x.to(gpu), y.to(gpu), max_steps=2, batch_size=6)
    assert batched.steps == 2


def test_devices_that_differ_are_refused(gpu):
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'x' must be on cuda:0 like the module, got cpu"):
        jacpot.jacobian(copy.deepcopy(net).to(gpu), torch.randn(4, 3))
    lin = jacpot.linearize(net).to(gpu)
    with pytest.raises(ValueError, match="'y' must be on cuda:0 like the outputs, got cpu"):
        lin.fit(torch.randn(4, 3).to(gpu), torch.randn(4, 2))
