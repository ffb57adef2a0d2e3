import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from jacpot import tickets
from jacpot.tickets import Mask
from jacpot.tickets.supermask.criteria import CRITERIA


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 3))


KINDS = ["edge_popup", "zhou", "biprop"]
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 5.0, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
]


def originals(hidden):
    return {n: p.clone() for n, p in hidden.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_at_their_random_values(kind, make_optimizer):
    net = make_net()
    hidden = tickets.supermask(net, kind, 0.5)
    before = originals(hidden)
    optimizer = make_optimizer(hidden.parameters())
    masks = [hidden.mask()]
    torch.manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(hidden(torch.randn(20, 10)), torch.randint(3, (20,))).backward()
        optimizer.step()
    after = originals(hidden)
    assert all(torch.equal(before[n], after[n]) for n in before)
    same = zip(net.parameters(), make_net().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert hidden.mask() != masks[0]
    if kind != "zhou":
        assert hidden.mask().densities == {"0.weight": 0.5, "2.weight": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_a_supermask_learns(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 3))
    hidden = tickets.supermask(net, kind, 0.5)
    x = torch.randn(500, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    optimizer = torch.optim.Adam(hidden.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(hidden(x), y).backward()
        optimizer.step()
    hidden.eval()
    assert (hidden(x).argmax(1) == y).float().mean() > 0.85
    plain = hidden.bake()
    assert torch.equal(plain(x), hidden(x))
    assert list(plain.state_dict()) == list(net.state_dict())
    assert all((plain.get_parameter(n)[~m] == 0).all() for n, m in hidden.mask().items())


def test_edge_popup_gradient_goes_straight_through():
    layer = nn.Linear(4, 3, bias=False).double()
    hidden = tickets.supermask(layer, "edge_popup", 0.5, rescale=False)
    x = torch.randn(6, 4, dtype=torch.float64)
    scores = hidden.network.parametrizations.weight[0].scores
    hidden(x).square().sum().backward()
    effective = (layer.weight * hidden.mask()["weight"]).detach().requires_grad_()
    (x @ effective.T).square().sum().backward()
    # Also of weights that are out: that is how they come in.
    assert torch.allclose(scores.grad, effective.grad * layer.weight)
    assert (scores.grad[~hidden.mask()["weight"]] != 0).any()


def test_edge_popup_keeps_the_exact_count_under_ties():
    hidden = tickets.supermask(nn.Linear(10, 1, bias=False), "edge_popup", 1 - 0.9)
    with torch.no_grad():
        hidden.network.parametrizations.weight[0].scores.zero_()
    assert hidden.mask().nnz == 1


def test_biprop_scale_uses_the_true_count():
    layer = nn.Linear(7, 5, bias=False).double()
    hidden = tickets.supermask(layer, "biprop", 0.3)
    kept = hidden.mask()["weight"]
    effective = hidden.network.weight
    scale = layer.weight[kept].abs().mean()
    assert int(kept.sum()) == 11
    assert torch.allclose(effective, torch.where(kept, scale * layer.weight.sign(), 0))
    # The scale is the best one: the residual is orthogonal to the signs.
    residual = (layer.weight - effective)[kept] * layer.weight[kept].sign()
    assert abs(residual.sum()) < 1e-12


def test_zhou_draws_in_training_and_not_in_evaluation():
    layer = nn.Linear(200, 200, bias=False)
    hidden = tickets.supermask(layer, "zhou", 0.3, rescale=False)
    drawn = [hidden.network.weight != 0 for _ in range(2)]
    assert not torch.equal(*drawn)
    assert drawn[0].float().mean() == pytest.approx(0.3, abs=0.02)
    hidden.eval()
    assert torch.equal(hidden.network.weight != 0, hidden.mask()["weight"])
    rescaled = tickets.supermask(layer, "zhou", 0.3).network.weight
    assert rescaled[rescaled != 0].abs().max() > 2.5 * layer.weight.abs().max()


def test_zhou_gradient_is_that_of_the_probability():
    layer = nn.Linear(4, 3, bias=False).double()
    hidden = tickets.supermask(layer, "zhou", 0.5, rescale=False)
    scores = hidden.network.parametrizations.weight[0].scores
    hidden(torch.eye(4).double()).sum().backward()
    assert torch.allclose(scores.grad, layer.weight * 0.25)  # sigmoid'(0)


def test_signed_constant_keeps_signs_and_second_moment():
    net = make_net()
    hidden = tickets.supermask(net, "zhou", weights="signed_constant", rescale=False)
    weight = hidden.network[0].parametrizations.weight.original
    assert torch.equal(weight.sign(), net[0].weight.sign())
    assert weight.abs().unique().numel() == 1
    assert torch.allclose(weight.square().mean(), net[0].weight.square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_come_from_the_seed_alone(kind):
    a = tickets.supermask(make_net(), kind, seed=3)
    torch.rand(7)
    b = tickets.supermask(make_net(), kind, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    hidden = tickets.supermask(make_net(), "edge_popup", 0.5)
    other = copied(hidden)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    assert other.mask() != hidden.mask()
    assert torch.equal(other.network[0].weight != 0, other.mask()["0.weight"])


def test_refusals():
    with pytest.raises(ValueError, match="'kind' must be"):
        tickets.supermask(make_net(), "hidden")
    with pytest.raises(ValueError, match=r"'density' must lie in \(0, 1\), got 0"):
        tickets.supermask(make_net(), density=0)
    with pytest.raises(TypeError, match="'density' must be a number, got str"):
        tickets.supermask(make_net(), density="half")
    net = make_net()
    with pytest.raises(ValueError, match="wears a mask"):
        tickets.supermask(tickets.apply(net, Mask.ones(net)))


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_rank_as_they_say(name):
    first, last = make_net(), make_net()
    torch.manual_seed(3)
    with torch.no_grad():
        last[0].weight.add_(torch.randn_like(last[0].weight) * 0.2)
    scores = tickets.criterion(name, first, last)
    mask = tickets.prune(scores, 0.5, "layer")["0.weight"]
    a, b = first[0].weight.detach(), last[0].weight.detach()
    measure = {
        "large_final": b.abs(),
        "small_final": -b.abs(),
        "large_init": a.abs(),
        "small_init": -a.abs(),
        "magnitude_increase": b.abs() - a.abs(),
        "movement": (b - a).abs(),
        "large_final_same_sign": torch.where(a * b > 0, b.abs(), -b.abs()),
    }.get(name)
    if measure is not None:
        assert measure[mask].min() >= measure[~mask].max()
    assert all(s.isfinite().all() for s in scores.values())


@pytest.mark.parametrize(
    "kept", ["initial", "signed_constant", "reinitialised", "shuffled", "mean"]
)
@pytest.mark.parametrize("pruned", ["zero", "initial", "mean"])
def test_mask_actions(kept, pruned):
    net = make_net()
    mask = Mask.ones(net) & Mask({n: torch.rand(m.shape) < 0.4 for n, m in Mask.ones(net).items()})
    weight, new = net[0].weight, tickets.rebuild(net, mask, kept, pruned, seed=5)[0].weight
    on = mask["0.weight"]
    expected = {"zero": torch.zeros(()), "initial": weight, "mean": weight.mean()}[pruned]
    assert torch.equal(new[~on], expected.expand_as(weight)[~on])
    if kept == "initial":
        assert torch.equal(new[on], weight[on])
    elif kept == "shuffled":
        assert torch.equal(new[on].sort().values, weight[on].sort().values)
        assert not torch.equal(new[on], weight[on])
    elif kept == "reinitialised":
        assert not (new[on] == weight[on]).any()
    else:
        assert torch.equal(new[on].sign(), weight[on].sign())
        assert new[on].abs().unique().numel() == 1
