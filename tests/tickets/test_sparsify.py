import pytest
import torch
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3)),
    )


def make_mask(net) -> Mask:
    shares = {"0.weight": 0.3, "3.weight": 0.1, "5.weight": 0.8}
    return Mask({n: torch.rand(m.shape) < shares[n] for n, m in Mask.ones(net).items()})


def test_the_same_function_with_fewer_parameters():
    net = make_net()
    mask = make_mask(net)
    fast = tickets.sparsify(net, mask)
    x = torch.randn(6, 2, 5, 5)
    with tickets.applied(net, mask):
        assert torch.allclose(fast(x), net(x), atol=1e-6)
    assert type(net[0]) is nn.Conv2d
    sparse = sum(p.numel() for p in fast[3].parameters())
    assert sparse == int(mask["3.weight"].sum()) + 20
    assert list(tickets.applied_mask(fast)) == ["5.weight"]  # too dense to be faster sparse


def test_it_trains_as_the_masked_network_does_and_revives_nothing():
    net = make_net()
    mask = make_mask(net)
    tickets.apply(net, mask)
    fast = tickets.sparsify(net)
    x, y = torch.randn(16, 2, 5, 5), torch.randint(3, (16,))
    losses = []
    for module in (net, fast):
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-3
    assert torch.allclose(net(x), fast(x), atol=1e-2)
    assert (fast[5].weight[~mask["5.weight"]] == 0).all()


def check(net, x):
    mask = Mask({n: torch.rand(m.shape) < 0.3 for n, m in Mask.ones(net).items()})
    fast = tickets.sparsify(net, mask)
    with tickets.applied(net, mask):
        torch.testing.assert_close(fast(x), net(x))
    return fast


def test_what_is_used_twice_stays_the_same_function():
    layer = nn.Linear(8, 8)
    fast = check(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 8))
    assert fast[0] is fast[2]
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    fast = check(tied, torch.randn(4, 8))
    assert fast[0].values is fast[2].values
    head = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    head[1].weight = head[0].weight
    fast = check(head, torch.arange(9))
    assert fast[1].parametrizations.weight.original is fast[0].parametrizations.weight.original


def test_a_shared_parameter_may_go_by_any_of_its_names():
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    mask = torch.rand(8, 8) < 0.4
    x = torch.randn(4, 8)
    expected = tickets.sparsify(tied, {"0.weight": mask})(x)
    for names in (["2.weight"], ["2.weight", "0.weight"]):
        masks = dict.fromkeys(names, mask)
        assert torch.equal(tickets.sparsify(tied, masks)(x), expected)
        with tickets.applied(tied, masks):
            assert list(tickets.applied_mask(tied)) == ["0.weight"]
            torch.testing.assert_close(tied(x), expected)
    with pytest.raises(ValueError, match=r"one mask for '2\.weight' and '0\.weight'"):
        tickets.apply(tied, {"0.weight": mask, "2.weight": ~mask})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own
@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"padding": "same"}, True),
        ({"padding": "same", "kernel_size": 2}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
    ],
)
def test_padding_of_any_kind(options, sparse):
    conv = nn.Conv2d(2, 4, **{"kernel_size": 3, **options})
    fast = check(nn.Sequential(conv), torch.randn(2, 2, 6, 6))
    assert isinstance(fast[0], nn.Conv2d) is not sparse
