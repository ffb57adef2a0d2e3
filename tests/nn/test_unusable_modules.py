"""Networks without values, networks and examples of inference mode, examples of another type."""

import copy

import pytest
import torch
from torch import nn

import jacpot
from jacpot import tickets

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
SCORES = {
    "magnitude": lambda net, x, y: tickets.score.magnitude(net),
    "random": lambda net, x, y: tickets.score.random(net),
    "snip": tickets.score.snip,
    "grasp": tickets.score.grasp,
    "synflow": lambda net, x, y: tickets.score.synflow(net, x),
    "fisher": lambda net, x, y: tickets.score.fisher(net, x),
    "ntk": tickets.score.ntk,
}
WAYS = {
    **SCORES,
    "ones": lambda net, x, y: jacpot.Mask.ones(net),
    "apply": lambda net, x, y: tickets.apply(net, MASK),
    "sparsify": lambda net, x, y: jacpot.nn.sparsify(net, MASK),
    "supermask": lambda net, x, y: tickets.supermask(net),
    "imp": lambda net, x, y: tickets.imp(net, lambda net: None, rounds=1),
    "inspect": lambda net, x, y: tickets.inspect(net, MASK, x),
    "jacobian": lambda net, x, y: jacpot.jacobian(net, x),
    "linearize": lambda net, x, y: jacpot.linearize(net),
    "gauss_newton": lambda net, x, y: jacpot.gauss_newton(net, x, torch.zeros(6, 3)),
}


def network(**options):
    norm = nn.BatchNorm1d(5, **options).eval()
    return nn.Sequential(nn.Linear(4, 5, **options), norm, nn.ReLU(), nn.Linear(5, 3, **options))


MASK = jacpot.Mask.ones(network()).shuffle()


@pytest.mark.parametrize("way", WAYS)
def test_networks_without_values_are_refused(way):
    for net in (network(device="meta"), network().to("meta")):
        with pytest.raises(ValueError, match=r"Linear \(at '0'\) are on the meta device"):
            WAYS[way](net, X, Y)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"LazyLinear \(at '0'\) get their shape when"):
        WAYS[way](lazy, X, Y)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_network_is_refused(way):
    for other in (None, [network()], nn.Linear):
        with pytest.raises(TypeError, match=r"'module' must be a torch\.nn\.Module, got "):
            WAYS[way](other, X, Y)


@pytest.mark.parametrize("score", SCORES)
def test_scores_take_what_was_made_in_inference_mode(score):
    net = network()
    expected = SCORES[score](net, X, Y)
    with torch.inference_mode():
        made, x, y = copy.deepcopy(net), X.clone(), Y.clone()
    found = SCORES[score](made, x, y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_networks_of_inference_mode_are_not_changed():
    with torch.inference_mode():
        net = network()
        tickets.remove(tickets.apply(net, MASK))  # in that mode they can be
    for way in ("apply", "gauss_newton"):
        with pytest.raises(ValueError, match=r"'0\.weight' was made in inference mode: give copy"):
            WAYS[way](net, X, Y)
    assert len(tickets.applied_mask(tickets.apply(copy.deepcopy(net), MASK))) == 2


@pytest.mark.parametrize("x", [X.double(), X.half(), X.long()], ids=lambda x: str(x.dtype))
def test_examples_of_another_type_are_refused_by_name(x):
    lin = jacpot.linearize(network())
    for call in (lin, lambda x: SCORES["snip"](network(), x, Y)):
        with pytest.raises(TypeError, match=r"'x' must be torch\.float32 .*, got " + str(x.dtype)):
            call(x)


def test_a_module_may_take_other_types_than_its_own():
    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    lin = jacpot.linearize(Casting(4, 3))
    assert torch.equal(lin(X.double()), lin(X))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lin(X.double()[:, :2])


def test_scores_refuse_what_is_no_tensor():
    for score in ("snip", "grasp", "synflow"):
        with pytest.raises(TypeError, match=r"'x' must be a torch\.Tensor, got list"):
            SCORES[score](network(), [1, 2], Y)
