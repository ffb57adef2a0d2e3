"""Jacobian, kernel and fit against `torch.func` in float64: ten digits, whatever the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import jacpot

TOLERANCE = 1e-10


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)), (12,)


def wide():  # weights large enough for kernels of our own
    layers = nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 6)
    return nn.Sequential(*layers), (70,)


def cnn():
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12, 3)), (2, 6, 6)


def difference(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).norm()) / max(float(expected.norm()), 1e-300)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_ten_digits(make, size):
    torch.manual_seed(0)
    net, shape = make()
    net = net.double()
    x = torch.randn(size, *shape, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(inputs, p):
        return functional_call(net, p, (inputs,))

    count = sum(p.numel() for p in parameters.values())
    dense = torch.zeros(0, 3, count, dtype=torch.float64)  # torch cannot differentiate no examples
    if size:
        rows = jacrev(partial(outputs, x))(parameters)
        dense = torch.cat([rows[name].reshape(size, 3, -1) for name in parameters], 2)

    j = jacpot.jacobian(net, x)
    assert difference(j.dense(), dense) <= TOLERANCE
    expected = torch.einsum("nkp,mlp->nkml", dense, dense)
    assert difference(jacpot.ntk(net, x), expected) <= TOLERANCE
    assert difference(j.gram(), expected) <= TOLERANCE

    y = torch.randn(size, 3, dtype=torch.float64)
    matrix = dense.reshape(size * 3, dense.shape[2])
    residual = (y - net(x).detach()).reshape(-1)
    for ridge in (0.0, 0.3):
        lin = jacpot.linearize(net)
        lin.fit(x, y, ridge=ridge, tol=1e-13)
        kernel = matrix @ matrix.T + ridge * torch.eye(size * 3, dtype=torch.float64)
        delta = matrix.T @ torch.linalg.solve(kernel, residual)
        flat = torch.cat([lin.delta[name].reshape(-1) for name in parameters])
        assert difference(flat, delta) <= TOLERANCE
        new = torch.randn(5, *shape, dtype=torch.float64)
        expected = torch.func.jvp(partial(outputs, new), (parameters,), (dict(lin.delta),))
        assert difference(lin(new), expected[0] + expected[1]) <= TOLERANCE


@pytest.mark.parametrize("n", [3, 70])  # few examples, and more
def test_wide_layers(n):
    torch.manual_seed(0)
    net, shape = wide()
    net = net.double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def output(p, example):
        return functional_call(net, p, (example[None],))[0]

    rows = torch.func.vmap(jacrev(output), (None, 0))(parameters, x)
    dense = torch.cat([rows[name].flatten(2) for name in parameters], 2)
    assert difference(jacpot.jacobian(net, x).dense(), dense) <= TOLERANCE
