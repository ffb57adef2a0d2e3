import math

import pytest
import torch
from torch import nn

from jacpot import tickets


def make_target(bias=True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 9, bias=bias), nn.ReLU(), nn.Linear(9, 4, bias=bias)]
    return nn.Sequential(nn.Flatten(), *layers).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_ticket_of_a_random_network_is_the_target(nonnegative, bias):
    target = make_target(bias)
    found = tickets.approximate(target, 1e-3, 24, nonnegative=nonnegative)
    assert found.failures == 0
    assert found.max_error <= 1e-3
    x = torch.randn(50, 3, 4, dtype=torch.float64)
    x = x.abs() if nonnegative else x
    with tickets.applied(found.network, found.mask) as ticket:
        error = (ticket(x) - target(x)).abs().max()
    # A layer adds at most epsilon per input, and hands on what the layer before was off.
    first = 1e-3 * (x.flatten(1).abs().sum(1).max() + 1)
    hidden = torch.relu(target[1](x.flatten(1))).sum(1).max() + 9 * first + 1
    bound = target[3].weight.abs().sum(1).max() * first + 1e-3 * hidden
    assert error < bound
    assert error > 0


def test_the_random_network_is_random_and_the_report_is_true():
    target = make_target()
    found = tickets.approximate(target, 0.01, 20, seed=1)
    again = tickets.approximate(target, 0.01, 20, seed=1)
    other = tickets.approximate(target, 0.01, 20, seed=2)
    first = found.network[1].second
    assert torch.equal(first, again.network[1].second)
    assert not torch.equal(first, other.network[1].second)
    assert first.abs().max() <= 1
    assert first.std() == pytest.approx(1 / math.sqrt(3), abs=0.05)
    assert found.weights == sum(p.numel() for p in target.parameters())
    assert found.bound == pytest.approx(math.log2(100))
    assert found.kept < found.overparameterisation
    # Errors recomputed from what the mask leaves.
    with tickets.applied(found.network, found.mask) as ticket:
        pair = ticket[3]
        positive = (pair.second * torch.relu(pair.first)).sum(2)
        wanted = torch.cat([target[3].weight, target[3].bias[:, None]], dim=1)
        assert (positive - wanted).abs().max() <= found.max_error + 1e-12


def test_too_few_samples_are_reported_not_hidden():
    found = tickets.approximate(make_target(), 1e-3, 4)
    assert found.failures > 0
    assert found.failure_share == found.failures / found.weights
    assert found.max_error > 1e-3


def test_approximate_refusals():
    with pytest.raises(TypeError, match="got Tanh at 1"):
        tickets.approximate(nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        tickets.approximate(make_target(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_are_exact(dtype):
    torch.manual_seed(0)
    weight = torch.randn(40, 30, dtype=dtype) * 10 ** torch.linspace(-6, 6, 30, dtype=dtype)
    weight[0, 0] = 0
    weight[0, 1] = torch.finfo(dtype).tiny
    exponents, edges = tickets.powers_of_two(weight)
    assert exponents == sorted(exponents, reverse=True)
    powers = torch.tensor([math.ldexp(1.0, e) for e in exponents], dtype=torch.float64)
    signed = edges[0].double() - edges[1].double()
    assert torch.equal((signed * powers.view(-1, 1, 1)).sum(0).to(dtype), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multigraph_has_exactly_the_weights_and_only_powers_of_two(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5, bias=False)).to(dtype)
    graph = tickets.multigraph(net)
    for index in (0, 2):
        weight, bias = graph[index].weights()
        assert torch.equal(weight, net[index].weight)
        mantissa, _ = torch.frexp(graph[index].edges)
        assert (mantissa.abs() == 0.5).all()
    assert torch.equal(graph[0].weights()[1], net[0].bias)
    assert (bias == 0).all()
    x = torch.randn(7, 20, dtype=dtype)
    assert torch.allclose(graph(x), net(x), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert not list(graph.parameters())


def test_few_bits_truncate():
    layer = nn.Linear(30, 30)
    graph = tickets.multigraph(layer, bits=4)
    error = (graph.weights()[0] - layer.weight).abs().max()
    assert 0 < error < graph.edges.abs().min()
    assert len(graph.edges) == 8
    with pytest.raises(ValueError, match="'bits' must be at least 1"):
        tickets.multigraph(layer, bits=0)
    with pytest.raises(ValueError, match="must be finite"):
        tickets.powers_of_two(torch.tensor([float("inf")]))


def test_a_layer_of_zeros_needs_no_edges():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert (tickets.multigraph(layer)(torch.ones(1, 3)) == 0).all()
