"""Sparse and masked layers on a GPU: outputs and gradients of the dense layers they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import jacpot


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sparse_layers_train_on_a_gpu(gpu, kind):
    torch.manual_seed(0)
    layer = nn.Linear(12, 9) if kind == "linear" else nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(5, 12) if kind == "linear" else torch.randn(2, 3, 5, 5)
    network = nn.Sequential(layer).double()
    masks = {"0.weight": torch.rand(layer.weight.shape) < 0.15}
    dense = copy.deepcopy(network)
    with torch.no_grad():
        dense[0].weight.mul_(masks["0.weight"])
    sparse = jacpot.nn.sparsify(network, masks).to(gpu)
    x = x.double()
    moved = x.to(gpu).requires_grad_()
    here, there = dense(x.requires_grad_()), sparse(moved)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here)
    here.square().sum().backward()
    there.square().sum().backward()
    torch.testing.assert_close(moved.grad.cpu(), x.grad)
    kept = dense[0].weight.grad[masks["0.weight"]]
    torch.testing.assert_close(sparse[0].values.grad.cpu(), kept)
    torch.testing.assert_close(sparse[0].bias.grad.cpu(), dense[0].bias.grad)
