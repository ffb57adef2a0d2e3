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
