"""What is computed where, whatever ``torch.set_default_device`` says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import jacpot
from jacpot.tickets import score


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(27, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


NET, TABLE = network(), nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
X, Y, LABELS = torch.randn(5, 2, 3, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
TOKENS, ROOT, MASK = torch.randint(0, 7, (5, 5)), torch.randn(30, 40), torch.rand(9, 27) < 0.2
MATRIX, RIGHT, HOST = ROOT @ ROOT.T, torch.randn(30, 3), torch.empty(5, 5)
TICKET = jacpot.tickets.prune(score.magnitude(NET), density=0.4)
SPARSE = jacpot.nn.SparseLinear.from_linear(nn.Linear(27, 9), MASK)


def fitted(y=Y, **options):
    linear = jacpot.linearize(NET)
    linear.fit(X, y, **options)
    return linear(X)


def fit_and_ask():
    fit = jacpot.linearize(NET).fit(X, Y, ridge=0.1)
    fit.leave_one_out()
    fit.influence(X)
    return fit.posterior().variance(X)


def newton():
    net = copy.deepcopy(NET)
    jacpot.gauss_newton(net, X, Y, max_steps=3)
    return next(net.parameters())


def first(scores):
    return next(iter(scores.values()))


CALLS = {
    "pattern": lambda path: jacpot.Pattern(MASK).mask(),
    "sparse layer": lambda path: SPARSE(X.flatten(1)[:, :1].expand(5, 27)),
    "jacobian": lambda path: jacpot.jacobian(NET, X).dense(),
    "masked": lambda path: jacpot.jacobian(NET, X, mask=TICKET).gram(),
    "table": lambda path: jacpot.jacobian(TABLE, TOKENS).gram(),
    "sketch": lambda path: jacpot.jacobian(NET, X).sketch(8),
    "norms": lambda path: jacpot.jacobian(NET, X).column_norms(),
    "ntk": lambda path: jacpot.ntk(NET, X),
    "ntk of parts": lambda path: jacpot.ntk(NET, X, outputs="trace", out=HOST, batch_size=2),
    "ntk in a file": lambda path: torch.from_numpy(
        jacpot.ntk(NET, X, outputs="trace", out=path / "kernel.npy", batch_size=2)[:]
    ),
    "fit, ridge": lambda path: fitted(ridge=1.0),
    "fit, primal": lambda path: fitted(ridge=1.0, method="primal", preconditioner="kronecker"),
    "fit, lsmr": lambda path: fitted(method="lsmr"),
    "fit, trace": lambda path: fitted(ridge=1.0, preconditioner="trace"),
    "fit, gcv": lambda path: fitted(ridge="gcv"),
    "fit, softmax": lambda path: fitted(LABELS, loss="cross_entropy", ridge=0.1),
    "fit, asked": lambda path: fit_and_ask(),
    "gauss_newton": lambda path: newton(),
    "grasp": lambda path: first(score.grasp(NET, X, LABELS)),
    "score.ntk": lambda path: first(score.ntk(NET, X)),
    "strong": lambda path: first(jacpot.tickets.random_mask(TICKET)).double(),
}
for method in ("cg", "block_cg", "cholesky", "lsmr", "minres"):
    CALLS[method] = lambda path, method=method: jacpot.solve(MATRIX, RIGHT, 0.1, method).x
for kind in ("nystrom", "partial_cholesky"):
    CALLS[kind] = lambda path, kind=kind: (
        jacpot.solve(MATRIX, RIGHT, 0.1, "cg", preconditioner=kind).x
    )


@pytest.mark.parametrize("name", CALLS)
def test_results_are_where_the_arguments_are(name, tmp_path):
    """A device without numbers as the default: what forgets its own fails or comes back there."""
    expected = CALLS[name](tmp_path).clone()
    for file in tmp_path.iterdir():
        file.unlink()
    with torch.device("meta"):
        found = CALLS[name](tmp_path)
        assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected)
