import copy

import pytest
import torch
from torch import nn

import jacpot
from jacpot import tickets
from jacpot.tickets import Mask, score


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def random_mask(net, density=0.6) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask(
        {n: torch.rand(m.shape, generator=generator) < density for n, m in Mask.ones(net).items()}
    )


def data():
    torch.manual_seed(2)
    return torch.randn(8, 4).double(), torch.randint(3, (8,))


SCORES = {
    "fisher": lambda net, x, y, mask: score.fisher(net, x, mask),
    "trace": lambda net, x, y, mask: score.ntk(net, x, mask=mask),
    "alignment": lambda net, x, y, mask: score.ntk(net, x, y, "alignment", mask),
    "distance": lambda net, x, y, mask: score.ntk(net, x, criterion="distance", mask=mask),
}


def dense_columns(net, x, mask):
    """(N * K, P) of the weights that the mask names, zero where pruned."""
    network = copy.deepcopy(net)
    with torch.no_grad():
        for name, kept in mask.items():
            network.get_parameter(name).mul_(kept)
    names = list(mask)

    def f(*weights):
        return torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (x,))

    weights = tuple(network.get_parameter(n).detach() for n in names)
    blocks = torch.autograd.functional.jacobian(f, weights)
    columns = [(b * mask[n]).flatten(2).flatten(0, 1) for n, b in zip(names, blocks, strict=True)]
    return torch.cat(columns, dim=1), torch.cat([w.flatten() for w in weights])


def flat(scores):
    return torch.cat([s.flatten() for s in scores.values()])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_against_the_written_out_jacobian(name, masked):
    net = make_net()
    x, y = data()
    mask = random_mask(net) if masked else None
    found = flat(SCORES[name](net, x, y, mask))
    columns, weights = dense_columns(net, x, mask or Mask.ones(net))
    squared = columns.square().sum(0)
    if name == "fisher":
        expected = weights.square() * squared / len(x)
    elif name == "trace":
        expected = squared
    elif name == "alignment":
        one_hot = nn.functional.one_hot(y, 3).double()
        expected = (columns.T @ (one_hot - one_hot.mean(0)).flatten()).square()
    else:
        dense, _ = dense_columns(net, x, Mask.ones(net))
        gap = dense @ dense.T - columns @ columns.T
        expected = 2 * ((gap @ columns) * columns).sum(0) + squared.square()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_distance_is_that_of_dropping_a_column():
    net = make_net()
    x, _ = data()
    mask = random_mask(net)
    scores = flat(score.ntk(net, x, criterion="distance", mask=mask))
    columns, _ = dense_columns(net, x, mask)
    dense, _ = dense_columns(net, x, Mask.ones(net))
    target = dense @ dense.T
    before = (target - columns @ columns.T).square().sum()
    for p in mask["0.weight"].flatten().nonzero().flatten()[:4].tolist():
        fewer = columns.clone()
        fewer[:, p] = 0
        after = (target - fewer @ fewer.T).square().sum()
        assert torch.allclose(scores[p], after - before, rtol=1e-8)


@pytest.mark.parametrize("name", SCORES)
def test_kernel_scores_are_pure_also_on_an_applied_mask(name):
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = data()
    net(x).sum().backward()
    net[0].weight.requires_grad_(False)
    mask = random_mask(net)
    plain = SCORES[name](net, x, y, mask)
    tickets.apply(net, mask)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    versions = [(p._version, p.requires_grad) for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters()]
    rng = torch.get_rng_state()
    worn = SCORES[name](net, x, y, mask)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert versions == [(p._version, p.requires_grad) for p in net.parameters()]
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training
    assert list(plain) == list(mask)
    for n, kept in mask.items():
        assert torch.allclose(plain[n], worn[n], rtol=1e-10, atol=1e-12)
        assert (plain[n][~kept] == 0).all()


def test_refusals():
    net = make_net()
    x, y = data()
    with pytest.raises(ValueError, match="'criterion' must be"):
        score.ntk(net, x, criterion="rank")
    with pytest.raises(ValueError, match="'y' is needed"):
        score.ntk(net, x, criterion="alignment")
    with pytest.raises(ValueError, match=r"labels \(N,\) or targets \(8, 3\)"):
        score.ntk(net, x, y[:3], "alignment")


def test_kernel_similarity():
    net = make_net()
    x, _ = data()
    mask = random_mask(net)
    same = tickets.kernel_similarity(net, x, mask, mask)
    assert same.cka == pytest.approx(1)
    assert same.distance == 0
    found = tickets.kernel_similarity(net, x, None, mask)
    assert 0 < found.cka < 1
    assert found.distance > 0.05
    kernel = jacpot.ntk(net, x, mask=mask, outputs="trace")
    assert torch.allclose(found.spectra[1], torch.linalg.eigvalsh(kernel).flip(0), atol=1e-10)
    assert 1 <= found.effective_ranks[1] <= len(x)
    doubled = copy.deepcopy(net)
    with torch.no_grad():
        doubled[2].weight.mul_(2)
    assert tickets.kernel_similarity(net, x, other=doubled).distance > 0


def test_tangent_fits_of_tickets():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    x = torch.randn(60, 5).double()
    y = (x @ torch.randn(5, 3).double()).argmax(1)
    mask = tickets.prune(score.ntk(net, x), 0.3, "layer")
    fits = tickets.tangent_fits(
        net, {"dense": None, "ticket": mask}, x[:40], y[:40], x[40:], y[40:], ridge=0.1
    )
    assert fits["dense"].solution.converged
    assert fits["ticket"].solution.converged
    assert fits["dense"].train_loss < fits["ticket"].train_loss
    assert fits["ticket"].test_accuracy > 0.5
    delta = fits["ticket"].function.delta["0.weight"]
    assert (delta[~mask["0.weight"]] == 0).all()
    regression = tickets.tangent_fits(net, {"dense": None}, x, net(x).detach(), x, net(x).detach())
    assert regression["dense"].test_accuracy is None
    assert regression["dense"].test_loss < 1e-10
