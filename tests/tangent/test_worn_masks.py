"""Modules that wear a mask, and the library's own layers, are their plain networks with it."""

import copy

import pytest
import torch
from oracle import dense
from torch import nn

import jacpot
from jacpot import tickets
from jacpot.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from jacpot.ops.jacobian import Factors


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    ).double()


def mask_of(net):
    torch.manual_seed(1)
    chosen = {"0.weight", "3.weight", "4.bias"}
    return {n: torch.rand(p.shape) < 0.5 for n, p in net.named_parameters() if n in chosen}


X = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(2)).double()
Y = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("wrt", ["kept", "all"])
def test_the_jacobian_is_that_of_the_plain_network(wrt):
    net = network()
    mask = mask_of(net)
    plain = jacpot.jacobian(net, X, mask=mask, wrt=wrt)
    with tickets.applied(net, mask) as ticket:
        for given in (None, mask, tickets.applied_mask(ticket)):
            J = jacpot.jacobian(ticket, X, mask=given, wrt=wrt)
            assert torch.equal(J.dense(), plain.dense())
            assert [type(b) for b in J.blocks] == [type(b) for b in plain.blocks]
            assert list(J.unflatten(J.T @ Y)) == [n for n, _ in network().named_parameters()]
        assert not any("forward" in vars(m) for m in ticket.modules())


def test_a_mask_may_refine_the_one_worn_but_keep_no_more():
    net = network()
    mask = mask_of(net)
    finer = {"3.weight": mask["3.weight"] & (torch.rand(5, 16) < 0.5)}
    expected = jacpot.jacobian(net, X, mask={**mask, **finer}).dense()
    with tickets.applied(net, mask) as ticket:
        assert torch.equal(jacpot.jacobian(ticket, X, mask=finer).dense(), expected)
        with pytest.raises(ValueError, match=r"no more of '3\.weight' than the mask .* wears"):
            jacpot.jacobian(ticket, X, mask={"3.weight": torch.ones(5, 16).bool()})


def test_kernels_and_fits_of_a_ticket():
    net = network()
    mask = mask_of(net)
    plain = jacpot.linearize(net, mask=mask)
    expected = plain.fit(X, Y, ridge=0.1).x
    kernel = jacpot.ntk(net, X, mask=mask)
    with tickets.applied(net, mask) as ticket:
        torch.testing.assert_close(jacpot.ntk(ticket, X), kernel)
        for given in (None, mask):
            lin = jacpot.linearize(ticket, mask=given)
            torch.testing.assert_close(lin.fit(X, Y, ridge=0.1).x, expected)
            torch.testing.assert_close(lin(X), plain(X))
            assert list(lin.delta) == [n for n, _ in network().named_parameters()]
        assert tickets.kernel_similarity(ticket, X, mask, None).distance == 0
        fits = tickets.tangent_fits(ticket, {"it": mask}, X, Y, X, Y, ridge=0.1)
        torch.testing.assert_close(fits["it"].solution.x, expected)


@pytest.mark.parametrize("with_mask", [False, True])
def test_gauss_newton_trains_a_ticket(with_mask):
    net = network()
    mask = mask_of(net)
    ticket = tickets.apply(copy.deepcopy(net), mask)
    plain = jacpot.gauss_newton(net, X, Y, mask=mask, max_steps=3)
    found = jacpot.gauss_newton(ticket, X, Y, mask=mask if with_mask else None, max_steps=3)
    assert found.losses == pytest.approx(plain.losses)
    for (_, p), (_, q) in zip(
        tickets.bake(ticket).named_parameters(), net.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p, q)


def test_a_shared_parameter_wears_its_mask_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    mask, x = {"0.weight": torch.rand(4, 4) < 0.5}, torch.randn(3, 4).double()
    expected = jacpot.jacobian(net, x, mask=mask).dense()
    with tickets.applied(net, mask):
        assert torch.equal(jacpot.jacobian(net, x).dense(), expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_sparse_layers_keep_their_factors(groups, bias, relu):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, padding=1, groups=groups, bias=bias).double()
    linear = nn.Linear(64, 3, bias=bias).double()
    kept = [torch.rand(layer.weight.shape) < 0.6 for layer in (conv, linear)]
    after = nn.ReLU() if relu else nn.Identity()
    plain = nn.Sequential(conv, after, nn.Flatten(), linear)
    mask = {"0.weight": kept[0], "3.weight": kept[1]}
    sparse = nn.Sequential(
        SparseConv2d.from_conv2d(conv, kept[0], relu=relu),
        nn.Flatten(),
        SparseLinear.from_linear(linear, kept[1]),
    )
    masked = nn.Sequential(
        MaskedConv2d.from_conv2d(conv, kept[0]), after, nn.Flatten(),
        MaskedLinear.from_linear(linear, kept[1]),
    )  # fmt: skip
    x = torch.randn(5, 2, 3, 3).double()
    expected = dense(plain, x, mask)
    for net in (sparse, masked):
        J = jacpot.jacobian(net, x)
        torch.testing.assert_close(J.dense(), expected)
        torch.testing.assert_close(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected))
        assert isinstance(J.blocks[-1], Factors)
    values = torch.rand(int(kept[1].sum())) < 0.5
    finer = {"3.weight": kept[1].masked_scatter(kept[1], values), "0.weight": kept[0]}
    J = jacpot.jacobian(sparse, x, mask={"2.values": values})
    torch.testing.assert_close(J.dense(), dense(plain, x, finer))
