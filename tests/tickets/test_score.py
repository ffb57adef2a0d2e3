import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from jacpot import tickets
from jacpot.tickets import Mask, score


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def make_conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    features = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(36, 3))


def random_mask(net) -> Mask:
    return Mask({k: torch.rand(v.shape) < 0.5 for k, v in Mask.ones(net).items()})


def data(net, n=12, classes=3):
    generator = torch.Generator().manual_seed(1)
    first = next(net.parameters())
    shape = (n, 6) if first.dim() == 2 else (n, 2, 5, 5)
    x = torch.randn(shape, generator=generator, dtype=first.dtype)
    return x, torch.randint(classes, (n,), generator=generator)


SCORES = {
    "magnitude": lambda net, x, y, mask: score.magnitude(net, mask),
    "random": lambda net, x, y, mask: score.random(net, 3, mask),
    "snip": lambda net, x, y, mask: score.snip(net, x, y, mask=mask),
    "grasp": lambda net, x, y, mask: score.grasp(net, x, y, mask=mask),
    "synflow": lambda net, x, y, mask: score.synflow(net, x, mask),
}


def snapshot(net):
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "grad": {k: p.grad.clone() for k, p in net.named_parameters()},
        "versions": {
            k: (id(v), v._version) for k, v in [*net.named_parameters(), *net.named_buffers()]
        },
        "modes": [m.training for m in net.modules()],
        "rng": torch.get_rng_state(),
        "requires_grad": [p.requires_grad for p in net.parameters()],
    }


def assert_same(a, b):
    assert a["versions"] == b["versions"]
    assert a["modes"] == b["modes"]
    assert a["requires_grad"] == b["requires_grad"]
    assert torch.equal(a["rng"], b["rng"])
    for group in ("state", "grad"):
        assert all(torch.equal(a[group][k], b[group][k]) for k in a[group])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_scoring_is_pure(name, masked):
    net = make_conv_net()
    x, y = data(net)
    net(x).square().sum().backward()  # gradients and running statistics that could be lost
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    mask = None
    if masked:
        mask = random_mask(net)
        tickets.apply(net, mask)
    before = snapshot(net)
    with torch.no_grad():
        scores = SCORES[name](net, x, y, mask)
    assert_same(before, snapshot(net))
    assert list(scores) == list(Mask.ones(net))
    assert all(not s.requires_grad and s.isfinite().all() for s in scores.values())
    if masked and name != "random":
        assert all((scores[n][~m] == 0).all() for n, m in mask.items())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_the_same_on_an_applied_mask(name):
    net = make_net()
    x, y = data(net)
    mask = random_mask(net)
    plain = SCORES[name](net, x, y, mask)
    tickets.apply(net, mask)
    worn = SCORES[name](net, x, y, mask)
    assert all(torch.equal(plain[n], worn[n]) for n in plain)


def test_scores_do_not_alias_the_weights():
    net = make_net()
    scores = score.magnitude(net)
    before = scores["0.weight"].clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(scores["0.weight"], before)


def test_snip_is_the_derivative_with_respect_to_the_mask():
    net = make_net()
    x, y = data(net)
    snip = score.snip(net, x, y)["2.weight"]
    step = 1e-6
    for index in [(0, 0), (1, 3), (4, 7)]:
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                moved[2].weight[index] *= 1 + sign * step
            losses.append(nn.functional.cross_entropy(moved(x), y))
        finite_difference = (losses[0] - losses[1]).abs() / (2 * step)
        assert torch.allclose(snip[index], finite_difference, rtol=1e-6, atol=1e-10)


def test_grasp_is_theta_times_hessian_gradient():
    net = make_net()
    x, y = data(net)
    grasp = score.grasp(net, x, y, mask=Mask.ones(net, include="0.weight"))["0.weight"]

    def loss(flat):
        output = functional_call(net, {"0.weight": flat.view(8, 6)}, (x,))
        return nn.functional.cross_entropy(output, y)

    theta = net[0].weight.detach().flatten()
    gradient = torch.func.grad(loss)(theta)
    expected = theta * (hessian(loss, theta) @ gradient)
    assert torch.allclose(grasp.flatten(), expected, rtol=1e-10, atol=1e-14)
    assert (expected < 0).any()
    assert (expected > 0).any()  # so thresholding |score| would be something else


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_grasp_sums_to_the_squared_gradient_for_a_quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)

    def quadratic(output, _):  # in the weights: half their squared image, so H is constant
        return output.square().sum() / 2

    scores = score.grasp(net, x, torch.empty(0), quadratic)["weight"]
    gradient = torch.autograd.grad(quadratic(net(x), None), net.weight)[0]
    assert torch.allclose(scores.sum(), gradient.square().sum(), rtol=1e-10)


def test_grasp_of_a_linear_loss_is_zero():
    net = nn.Linear(4, 3).double()
    scores = score.grasp(net, torch.ones(2, 4).double(), torch.empty(0), lambda out, _: out.sum())
    assert (scores["weight"] == 0).all()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_synflow_layer_sums_are_equal_and_invariant_to_rescaling(seed, factor):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(3, 6)
    before = score.synflow(net, x)
    sums = [s.sum() for s in before.values()]
    assert torch.allclose(torch.stack(sums), sums[0], rtol=1e-12)
    with torch.no_grad():  # the function of the network, hence the flow, stays
        net[0].weight.mul_(factor)
        net[2].weight.div_(factor)
    after = score.synflow(net, x)
    assert all(torch.allclose(before[n], after[n], rtol=1e-5) for n in before)
    assert all(s.dtype == torch.float64 for s in after.values())


def test_synflow_ignores_signs_and_data():
    net = make_net()
    x, _ = data(net)
    flipped = copy.deepcopy(net)
    with torch.no_grad():
        flipped[0].weight.neg_()
    a, b = score.synflow(net, x), score.synflow(flipped, -100 * x)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all((s > 0).all() for s in a.values())


def test_synflow_keeps_every_layer_of_a_deep_network():
    torch.manual_seed(0)
    layers = [nn.Linear(20, 40), nn.ReLU()]
    for _ in range(20):
        layers += [nn.Linear(40, 40), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(40, 5))
    x = torch.ones(1, 20)
    mask = tickets.prune_iteratively(lambda m: score.synflow(net, x, m), 1e-3, steps=100)
    assert all(m.any() for m in mask.values())
    assert mask.nnz == round(1e-3 * mask.numel)
    with pytest.raises(ValueError, match="without a weight"):
        tickets.prune(score.magnitude(net), 1e-4)


def test_a_loss_of_many_numbers_is_refused():
    net = make_net()
    x, y = data(net)
    with pytest.raises(ValueError, match=r"must return one number, got shape \(12,\)"):
        score.snip(net, x, y, lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"))


def test_a_diverging_score_says_so():
    net = make_net()
    x, y = data(net)
    with pytest.raises(RuntimeError, match="not finite"):
        score.snip(net, x * float("inf"), y)


def test_flow_refuses_indices():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="indices of an embedding"):
        tickets.score.synflow(net, x)
    with pytest.raises(TypeError, match="indices of an embedding"):
        tickets.inspect(net, tickets.Mask.ones(net), x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def test_recurrent_layers_are_scored_at_their_masked_weights():
    torch.manual_seed(0)
    net, x, y = Recurrent().double(), torch.randn(5, 6, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    mask = {name: torch.rand(kept.shape) < 0.6 for name, kept in Mask.ones(net).items()}
    scores = tickets.score.snip(net, x, y, mask=mask)
    with torch.no_grad():
        for name, kept in mask.items():
            net.get_parameter(name).mul_(kept)
    nn.functional.cross_entropy(net(x), y).backward()
    for name, found in scores.items():
        weight = net.get_parameter(name)
        torch.testing.assert_close(found, (weight * weight.grad).abs())
