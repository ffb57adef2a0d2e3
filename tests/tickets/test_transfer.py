import io

import pytest
import torch
from rich.console import Console
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask


def mlp(depth, width=5):
    layers = [nn.Linear(3, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def random_mask(net, density=0.5):
    return Mask({n: torch.rand(m.shape) < density for n, m in Mask.ones(net).items()})


def test_elastic_to_itself_is_the_identity():
    net = mlp(3)
    mask = random_mask(net)
    assert tickets.elastic(mask, net) == mask


@pytest.mark.parametrize(
    ("order", "expected"), [("interleaved", [2, 2, 4, 4]), ("appended", [2, 4, 2, 4])]
)
def test_stretching_repeats_layers(order, expected):
    source, target = mlp(2), mlp(4)
    mask = random_mask(source)
    stretched = tickets.elastic(mask, target, order)
    assert torch.equal(stretched["0.weight"], mask["0.weight"])
    assert torch.equal(stretched["10.weight"], mask["6.weight"])
    for layer, origin in zip([2, 4, 6, 8], expected, strict=True):
        assert torch.equal(stretched[f"{layer}.weight"], mask[f"{origin}.weight"])
    tickets.apply(target, stretched)(torch.randn(2, 3))


def test_squeezing_drops_layers():
    mask = random_mask(mlp(4))
    squeezed = tickets.elastic(mask, mlp(2))
    assert torch.equal(squeezed["2.weight"], mask["2.weight"])
    assert torch.equal(squeezed["4.weight"], mask["6.weight"])


def test_elastic_refuses_another_family():
    with pytest.raises(ValueError, match="'target' must have a parameter of the name"):
        tickets.elastic(random_mask(mlp(1)), nn.Conv2d(1, 1, 3))


def test_a_planted_ticket_is_recovered():
    torch.manual_seed(0)
    net = nn.Linear(30, 4, bias=False)
    planted = tickets.plant(net, 0.2, 300, (30,), scale=3.0)

    def train(module):
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (module(planted.x) - planted.y).square().mean()
            loss.backward()
            optimizer.step()
        return {"loss": loss.item()}

    found = tickets.imp(net, train, rounds=1, prune_fraction=0.8)
    jaccard = tickets.overlap(found.mask, planted.mask).jaccard
    Console(file=io.StringIO()).print(tickets.overlap(found.mask, planted.mask).table())
    assert jaccard == 1.0


def test_planting_leaves_the_network_alone_and_keeps_its_weights():
    net = mlp(1)
    before = [p.clone() for p in net.parameters()]
    planted = tickets.plant(net, 0.5, 10, (3,), noise=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    on = planted.mask["0.weight"]
    assert torch.equal(planted.teacher[0].weight[on], net[0].weight[on])
    assert planted.mask.density == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(planted.y, planted.teacher(planted.x))


def test_sanity_checks_train_each_control_once():
    net = mlp(1)
    mask = random_mask(net, 0.4)
    seen = {}

    def train(module):
        worn = tickets.applied_mask(module)
        seen[len(seen)] = (worn, module[0].weight.detach().clone(), torch.rand(1).item())
        return worn.density

    results = tickets.sanity_checks(net, mask, train, seed=5)
    assert list(results) == ["ticket", "shuffled", "reinitialised", "random"]
    ticket, shuffled, reinitialised, random = seen.values()
    assert ticket[0] == mask
    assert shuffled[0] != mask
    assert reinitialised[0] == mask
    assert random[0] != shuffled[0]
    assert shuffled[0].densities == random[0].densities == mask.densities
    assert not torch.equal(reinitialised[1], ticket[1])
    assert len({draw for _, _, draw in seen.values()}) == 1  # the same noise for all
    with pytest.raises(ValueError, match=r"has parameters? but no|no reset_parameters"):
        tickets.reinitialise(nn.ParameterList([nn.Parameter(torch.ones(2))]))
