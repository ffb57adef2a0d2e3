"""Whole networks against torch.func."""

import pytest
import torch
from oracle import check_operations, dense, relative_error
from zoo import NETWORKS, build

import jacpot


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobian(name):
    net, x = build(name)
    expected = dense(net, x)
    J = jacpot.jacobian(net, x)
    check_operations(J, expected, jacpot.jacobian(net, x[1:]), expected[1:])


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vit", "gpt"])
def test_ticket(name):
    net, x = build(name)
    mask = {key: torch.rand(p.shape) < 0.5 for key, p in net.named_parameters()}
    expected = dense(net, x, mask)
    J = jacpot.jacobian(net, x, mask=mask)
    check_operations(J, expected, jacpot.jacobian(net, x[1:], mask=mask), expected[1:])


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet18"])
@pytest.mark.parametrize("n", [0, 1])
def test_few_examples(name, n):
    net, x = build(name)
    J, whole = jacpot.jacobian(net, x[:n]), jacpot.jacobian(net, x)
    assert J.shape == (n * J.n_outputs, whole.n_parameters)
    assert relative_error(J.dense(), whole.dense()[:n]) < 1e-10
    assert relative_error(J.gram(whole), whole.gram()[:n]) < 1e-10
