"""Modules called with other tensors in the place of their own are left as they were found."""

import pytest
import torch
from oracle import by_autograd
from torch import nn
from torch.nn.utils import prune

import jacpot
from jacpot import tickets
from jacpot.nn.stand_ins import call_with, copy_of


def twice():
    """One layer under two names."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


class Counting(nn.Module):
    """Writes to its buffers, one in place, and the same one under two names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("alias", self.count)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        self.count += 1
        self.mean = 0.9 * self.mean
        return self.layer(x - self.mean) + self.alias


def torch_pruned():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    prune.l1_unstructured(net[0], "weight", 0.4)
    return net


def state(net):
    """All tensors by name, computed ones too, with their versions and values."""
    found = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers())}
    for name, child in net.named_modules():
        found |= {f"{name}.{k}": v for k, v in vars(child).items() if isinstance(v, torch.Tensor)}
    return {name: (t, t._version, t.detach().clone()) for name, t in found.items()}


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
USES = {
    "jacobian": lambda net, y: jacpot.jacobian(net, X).dense(),
    "ntk": lambda net, y: jacpot.ntk(net, X),
    "linearize": lambda net, y: jacpot.linearize(net)(X),
    "fit": lambda net, y: jacpot.linearize(net).fit(X, y, ridge=0.1),
    "snip": lambda net, y: tickets.score.snip(net, X, y, nn.functional.mse_loss),
    "synflow": lambda net, y: tickets.score.synflow(net, X),
    "inspect": lambda net, y: tickets.inspect(net, jacpot.Mask.ones(net), X),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", [twice, Counting, torch_pruned])
def test_left_as_found(make, use):
    net = make()
    before = state(net)
    use(net, torch.ones_like(make()(X)))
    after = state(net)
    assert before.keys() == after.keys()
    for name, (tensor, version, value) in before.items():
        assert after[name][0] is tensor, name
        assert after[name][1] == version, name
        assert torch.equal(tensor, value), name


@pytest.mark.parametrize("make", [twice, torch_pruned])
def test_the_jacobian_and_the_linearized_network_agree_with_autograd(make):
    net = make().double()
    x = X.double()
    lin = jacpot.linearize(net)
    lin.set_delta({name: torch.randn_like(value) for name, value in lin.delta.items()})
    rows = by_autograd(make().double(), x)
    torch.testing.assert_close(jacpot.jacobian(net, x).dense(), rows)
    step = torch.cat([value.flatten() for value in lin.delta.values()])
    torch.testing.assert_close(lin(x), make().double()(x) + rows @ step)


def test_a_network_that_writes_to_its_buffers_is_linearized_as_it_is():
    net = Counting()
    lin = jacpot.linearize(net)
    first, again = lin(X), lin(X)
    torch.testing.assert_close(first, net(X))
    assert torch.equal(first, again)


def test_a_stand_in_takes_every_place_once():
    net = twice()
    weight = torch.zeros(4, 4)
    given = call_with(net, {"0.weight": weight}, (X,))
    assert torch.equal(given, net[0].bias.expand(6, 4))
    assert isinstance(net[2].weight, nn.Parameter)


def test_copies_of_computed_weights_are_independent():
    net = torch_pruned()
    other = copy_of(net)
    with torch.no_grad():
        other[0].weight_orig.zero_()
    assert not torch.equal(other(X), net(X))
    assert net[0].weight.grad_fn is not None
