"""Products with the Jacobians of networks whose units are off in part, against torch.func."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense
from torch import nn

import jacpot
from jacpot.ops import jacobian_blocks


def products_of(module, x, mask=None):
    """Whether both products, alone and inside of a solver, are those of the dense Jacobian."""
    expected = dense(module, x, mask).flatten(0, 1)
    j = jacpot.jacobian(module, x, mask=mask)
    with patch.object(jacobian_blocks, "FEWEST_ROWS", 0):
        for tail in ((), (3,)):
            v = torch.randn(j.n_parameters, *tail, dtype=torch.float64)
            u = torch.randn(*j.outputs.shape, *tail, dtype=torch.float64)
            torch.testing.assert_close((j @ v).flatten(0, 1), expected @ v, rtol=0, atol=1e-10)
            back = expected.T @ u.flatten(0, 1)
            torch.testing.assert_close(j.T @ u, back, rtol=1e-12, atol=1e-10)
        if j.n_parameters:
            b = torch.randn(len(expected), dtype=torch.float64)
            solution = jacpot.solve(j, b, damping=1.0, tol=1e-12).x
            residual = expected.T @ (b - expected @ solution) - solution
            torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-8)
    return j


@given(
    widths=st.lists(st.sampled_from([1, 2, 9, 40]), min_size=0, max_size=3),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Hardtanh]),
    k=st.integers(1, 3),
    n=st.sampled_from([1, 70]),
    density=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_chains(each_isa, widths, activation, k, n, density, seed):
    torch.manual_seed(seed)
    sizes = [6, *widths, k]
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    module = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(n, 6, dtype=torch.float64)
    mask = None
    if density is not None:
        mask = {
            name: torch.rand(p.shape) < density
            for name, p in module.named_parameters()
            if p.ndim == 2
        }
    products_of(module, x, mask)


def test_convolutions_and_positions(each_isa):
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    j = products_of(convolutions.double(), torch.randn(9, 8, 5, 5, dtype=torch.float64))
    assert j.blocks[0].n_positions == 9
    assert j.blocks[0].live is not None
    tokens = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    j = products_of(tokens, torch.randn(5, 7, 20, dtype=torch.float64))
    assert j.blocks[0].n_positions == 7


def test_masked_layers(each_isa):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    mask = {"0.weight": torch.rand(30, 20) < 0.2, "2.weight": torch.rand(3, 30) < 0.5}
    j = products_of(module, torch.randn(70, 20, dtype=torch.float64), mask)
    assert j.blocks[0].live is not None
    assert j.blocks[1].live is None  # on everywhere
    convolution = nn.Sequential(
        nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    mask = {"0.weight": torch.rand(16, 4, 3, 3) < 0.3}
    j = products_of(convolution.double(), torch.randn(9, 8, 5, 5, dtype=torch.float64), mask)
    assert j.blocks[0].live is not None


def test_weights_that_change_later_do_not_matter():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    x = torch.randn(80, 6, dtype=torch.float64)
    j, expected = jacpot.jacobian(module, x), dense(module, x).flatten(0, 1)
    v, u = torch.randn(j.n_parameters).double(), torch.randn(80, 2).double()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    torch.testing.assert_close((j @ v).flatten(), expected @ v)
    torch.testing.assert_close(j.T @ u, expected.T @ u.flatten())
    assert j.blocks[0].live is not None
