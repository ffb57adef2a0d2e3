"""Whole networks against torch.func."""

import pytest
import torch
from oracle import dense, relative_error
from zoo import NETWORKS, build

import jacpot


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobian(name):
    net, x = build(name)
    expected = dense(net, x)
    J = jacpot.jacobian(net, x)
    v = torch.randn(J.n_parameters, 2, dtype=torch.float64)
    u = torch.randn(3, J.n_outputs, dtype=torch.float64)
    assert relative_error(J.dense(), expected) < 1e-10
    assert relative_error(J @ v, expected @ v) < 1e-10
    assert relative_error(J.T @ u, torch.einsum("nkp,nk->p", expected, u)) < 1e-10
    assert relative_error(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected)) < 1e-10
    assert relative_error(J.row_norms(), expected.norm(dim=2)) < 1e-10
    assert relative_error(J.column_norms(), expected.norm(dim=(0, 1))) < 1e-10


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vit", "gpt"])
def test_ticket(name):
    net, x = build(name)
    mask = {key: torch.rand(p.shape) < 0.5 for key, p in net.named_parameters()}
    expected = dense(net, x, mask)
    J = jacpot.jacobian(net, x, mask=mask)
    assert relative_error(J.dense(), expected) < 1e-10
    assert relative_error(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected)) < 1e-10


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet18"])
@pytest.mark.parametrize("n", [0, 1])
def test_few_examples(name, n):
    net, x = build(name)
    J, whole = jacpot.jacobian(net, x[:n]), jacpot.jacobian(net, x)
    assert J.shape == (n * J.n_outputs, whole.n_parameters)
    assert relative_error(J.dense(), whole.dense()[:n]) < 1e-10
    assert relative_error(J.gram(whole), whole.gram()[:n]) < 1e-10
