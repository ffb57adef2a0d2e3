"""What the kernel of a pruned network means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense, relative_error
from torch import nn

import jacpot


def mlp(width=8):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)).double()


def cnn(channels=6):
    return nn.Sequential(
        nn.Conv2d(2, channels, 3), nn.ReLU(), nn.Conv2d(channels, 3, 2), nn.Tanh(), nn.Flatten(),
    ).double()  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (cnn, (2, 5, 5))])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_pruning_whole_units_is_a_smaller_network(make, shape, outputs):
    torch.manual_seed(0)
    net, kept = make(), torch.tensor([0, 2, 3])
    small = make(len(kept))
    units = torch.zeros(net[0].weight.shape[0], dtype=torch.bool)
    units[kept] = True
    mask = {
        "0.weight": units.view(-1, *[1] * (net[0].weight.ndim - 1)).expand_as(net[0].weight),
        "0.bias": units,
        "2.weight": units.view(1, -1, *[1] * (net[2].weight.ndim - 2)).expand_as(net[2].weight),
    }
    with torch.no_grad():
        small[0].weight.copy_(net[0].weight[kept])
        small[0].bias.copy_(net[0].bias[kept])
        small[2].weight.copy_(net[2].weight[:, kept])
        small[2].bias.copy_(net[2].bias)
    x = torch.randn(6, *shape, dtype=torch.float64)
    J = jacpot.jacobian(net, x, mask=mask)
    assert J.n_parameters == sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(J.outputs, small(x).detach())
    ticket = jacpot.ntk(net, x, mask=mask, outputs=outputs)
    assert relative_error(ticket, jacpot.ntk(small, x, outputs=outputs)) < 1e-12


@given(st.floats(0, 1), st.integers(0, 2**31), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_kernel_keeps_what_the_mask_keeps(density, seed, convolutional):
    torch.manual_seed(seed)
    net, shape = (cnn(), (2, 5, 5)) if convolutional else (mlp(), (5,))
    mask = {name: torch.rand(p.shape) < density for name, p in net.named_parameters()}
    x = torch.randn(4, *shape, dtype=torch.float64)
    kept = torch.cat([part.flatten() for part in mask.values()])
    J = jacpot.jacobian(net, x, mask=mask)
    everything = jacpot.jacobian(net, x, mask=mask, wrt="all").dense()
    assert J.shape[1] == int(kept.sum())
    assert relative_error(everything, dense(net, x, mask, "all")) < 1e-10
    expected = torch.einsum("nkp,p,mlp->nkml", everything, kept.double(), everything)
    gram = J.gram()
    scale = torch.einsum("nkp,mlp->nkml", everything, everything).abs().max() + 1
    assert float((gram - expected).abs().max()) < 1e-12 * scale
    square = gram.reshape(J.shape[0], J.shape[0])
    assert torch.linalg.matrix_rank(square, hermitian=True, tol=1e-10 * scale) <= J.shape[1]


def test_everything_pruned():
    net, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    mask = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}
    J = jacpot.jacobian(net, x, mask=mask)
    assert J.shape == (12, 0)
    assert J.gram().abs().max() == 0
    assert (J @ torch.zeros(0, dtype=torch.float64)).shape == (4, 3)
    assert (J.T @ torch.zeros(4, 3, dtype=torch.float64)).shape == (0,)
    assert J.dense().shape == (4, 3, 0)
    assert J.row_norms().abs().max() == 0
    assert J.column_norms().shape == (0,)


def test_a_mask_of_jacpot_is_taken():
    net, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    mask = jacpot.Mask.ones(net)
    whole = jacpot.ntk(net, x)
    assert relative_error(jacpot.ntk(net, x, mask=mask), whole) < 1e-12


def test_tied_parameters_go_by_any_of_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.b = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    net, x = Tied(), torch.randn(3, 4, dtype=torch.float64)
    kept = torch.rand(4, 4) < 0.5
    first = jacpot.jacobian(net, x, mask={"a.weight": kept}).dense()
    assert torch.equal(first, jacpot.jacobian(net, x, mask={"b.weight": kept}).dense())
    assert relative_error(first, dense(net, x, {"a.weight": kept})) < 1e-10
