import io
import itertools

import pytest
import torch
from rich.console import Console
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask


def brute_force(masks):
    """Weights on a path of a chain of linear layers, by reachability from both ends."""
    forward = [torch.ones(masks[0].shape[1], dtype=torch.bool)]
    for mask in masks:
        forward.append((mask & forward[-1]).any(dim=1))
    backward = [torch.ones(masks[-1].shape[0], dtype=torch.bool)]
    for mask in reversed(masks):
        backward.insert(0, (mask & backward[0][:, None]).any(dim=0))
    return [m & forward[i] & backward[i + 1][:, None] for i, m in enumerate(masks)]


@pytest.mark.parametrize("seed", range(20))
def test_effective_masks_of_chains(seed):
    torch.manual_seed(seed)
    sizes = [4, 6, 5, 6, 3]
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    mask = Mask({n: torch.rand(m.shape) < 0.25 for n, m in Mask.ones(net).items()})
    report = tickets.inspect(net, mask, torch.randn(2, 4))
    expected = brute_force(list(mask.values()))
    assert all(torch.equal(a, b) for a, b in zip(report.effective.values(), expected, strict=True))
    assert report.connected == any(e.any() for e in expected)
    assert report.effective_density <= mask.density


def test_a_deep_network_neither_overflows_nor_vanishes():
    net = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(60)))
    assert tickets.inspect(net, Mask.ones(net), torch.ones(1, 100)).effective_density == 1.0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(x + torch.relu(self.inner(x)))


def test_a_skip_keeps_an_emptied_layer_from_cutting():
    net = Residual()
    mask = Mask.ones(net)
    mask = Mask({"inner.weight": ~mask["inner.weight"], "outer.weight": mask["outer.weight"]})
    report = tickets.inspect(net, mask, torch.ones(1, 4))
    assert report.emptied == ["inner.weight"]
    assert report.connected
    assert report.disconnected_units == {"inner.weight": 4, "outer.weight": 0}
    Console(file=io.StringIO()).print(report.table())


def test_convolutions_and_batch_norm_with_statistics_of_any_sign():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(27, 2))
    with torch.no_grad():
        net[1].running_mean.fill_(1000)
        net[1].weight.fill_(-1)
    mask = Mask.ones(net)
    first = mask["0.weight"].clone()
    first[1] = False
    report = tickets.inspect(net, Mask({**mask, "0.weight": first}), torch.randn(1, 2, 5, 5))
    assert report.disconnected_units["0.weight"] == 1
    assert not report.effective["4.weight"][:, 9:18].any()
    assert report.effective["4.weight"][:, :9].all()
    assert net[1].running_mean[0] == 1000
    assert net.training


def test_prune_refuses_to_cut_input_from_output():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    # The one kept unit of the first layer is not the one that the second listens to.
    scores = {"0.weight": torch.tensor([[1.0, 1.0], [0, 0]]), "2.weight": torch.tensor([[0, 1.0]])}
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="no path from input to output"):
        tickets.prune(scores, 0.5, network=(net, x))
    cut = tickets.prune(scores, 0.5, network=(net, x), allow_empty=True)
    assert not tickets.inspect(net, cut, x).connected
    skip, x = Residual(), torch.ones(1, 4)
    keep = Mask.ones(skip)
    scores = {name: torch.full(m.shape, float(name[0] == "o")) for name, m in keep.items()}
    assert tickets.prune(scores, 1 / 3, network=(skip, x)).nnz == 8
