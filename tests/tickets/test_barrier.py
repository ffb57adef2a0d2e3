import copy
import math

import pytest
import torch
from torch import nn

from jacpot import tickets


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def loss(net):
    x = torch.linspace(-1, 1, 40).view(10, 4)
    assert not net.training
    assert not torch.is_grad_enabled()
    return net(x).square().sum().item()


def test_identical_ends_have_no_barrier_and_every_value_is_the_same():
    net = make_net()
    found = tickets.barrier(loss, net, copy.deepcopy(net), steps=7)
    assert found.height == 0
    assert found.excess == 0
    assert len(set(found.values)) == 1


def test_nothing_is_trained_or_changed():
    a, b = make_net(), make_net()
    a(torch.randn(5, 4)).sum().backward()
    states = [copy.deepcopy(net.state_dict()) for net in (a, b)]
    grads = [p.grad.clone() for p in a.parameters()]
    tickets.barrier(loss, a, b, recalibrate=[torch.randn(20, 4)])
    for net, state in zip((a, b), states, strict=True):
        assert net.training
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(a.parameters(), grads, strict=True))


def test_height_and_excess():
    found = tickets.Barrier((0.0, 0.5, 1.0), (1.0, 4.0, 2.0))
    assert found.height == 2.5
    assert found.excess == 2.5
    slope = tickets.Barrier((0.0, 0.25, 1.0), (0.0, 1.0, 4.0))
    assert slope.excess == 0
    assert slope.height == 2.0  # the worse end counts against the mean of both


def test_permuted_networks_have_a_barrier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in (other[0].weight, other[0].bias):
            p.copy_(p.flip(0))
        other[2].weight.copy_(other[2].weight.flip(1))
    x = torch.randn(50, 4)
    target = net(x).detach()
    found = tickets.barrier(lambda m: (m(x) - target).square().mean().item(), net, other)
    assert found.values[0] == pytest.approx(found.values[-1], abs=1e-10)
    assert found.height > 0.01


def test_recalibration_gives_the_statistics_of_the_network_between():
    torch.manual_seed(0)
    a, b = make_net(), make_net()
    batches = [torch.randn(64, 4) + 3 for _ in range(3)]
    seen = []

    def watch(net):
        seen.append((net[1].running_mean.clone(), net[0](torch.cat(batches)).mean(0)))
        return 0.0

    tickets.barrier(watch, a, b, steps=3, recalibrate=batches)
    assert torch.allclose(*seen[1], atol=1e-5)
    assert torch.equal(seen[0][0], a[1].running_mean)


def test_stability_trains_two_copies_from_one_start():
    net = nn.Linear(2, 1)
    before = copy.deepcopy(net.state_dict())
    starts = []

    def train(copied):
        starts.append(copied.weight.detach().clone())
        with torch.no_grad():
            copied.weight.add_(torch.randn(1, 2))

    found = tickets.stability(net, train, lambda m: m.weight.square().sum().item())
    assert torch.equal(*starts)
    assert found.values[0] != found.values[-1]
    assert torch.equal(net.weight, before["weight"])
    same = tickets.stability(net, train, lambda m: m.weight.sum().item(), seeds=(3, 3))
    assert same.height == 0


def test_refusals():
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        tickets.barrier(loss, make_net(), make_net(), steps=1)
    with pytest.raises(ValueError, match="same parameters and buffers"):
        tickets.barrier(loss, make_net(), nn.Linear(1, 1))


def test_an_error_that_is_no_number_is_no_flat_path():
    for values in ((1.0, math.nan, 1.0), (math.nan, 1.0, 1.0)):
        found = tickets.Barrier((0.0, 0.5, 1.0), values)
        assert math.isnan(found.height)
        assert math.isnan(found.excess)


def test_masked_networks_are_joined_by_the_weights_they_compute_with():
    a, b = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    masks = [{"weight": torch.tensor([[True, True, False, False]])}]
    masks.append({"weight": ~masks[0]["weight"]})
    baked = [
        tickets.bake(tickets.apply(copy.deepcopy(n), m)) for n, m in zip((a, b), masks, strict=True)
    ]
    tickets.apply(a, masks[0])
    tickets.apply(b, masks[1])
    seen = []
    tickets.barrier(lambda net: seen.append(net.weight.clone()) or 0.0, a, b, steps=5)
    for i, weight in enumerate(seen):
        torch.testing.assert_close(weight, torch.lerp(baked[0].weight, baked[1].weight, i / 4))
    assert tickets.barrier(lambda net: net.weight.sum().item(), a, baked[1]).height >= 0
    assert list(tickets.applied_mask(a)) == ["weight"]
