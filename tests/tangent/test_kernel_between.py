"""Kernels between Jacobians whose blocks do not match: other masks, other lengths of examples."""

import pytest
import torch
from torch import nn

import jacpot


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def full(jacobian):
    """All columns, (N·K, P): zeros where nothing is kept."""
    rows = jacobian.dense().flatten(0, 1)
    return torch.stack(
        [torch.cat([v.flatten() for v in jacobian.unflatten(r).values()]) for r in rows]
    )


def some(*shape):
    return torch.rand(*shape) < 0.5


HALF = torch.arange(20).view(5, 4) % 2 == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"0.weight": HALF}, {"0.weight": ~HALF}),
        ({"0.weight": HALF}, None),
        (None, {"0.bias": torch.tensor([True, False, True, False, True])}),
        ({"0.weight": HALF, "0.bias": torch.zeros(5).bool()}, {"0.weight": some(5, 4)}),
        ({"0.weight": HALF}, {"0.weight": HALF.clone()}),
        ({"2.weight": torch.zeros(3, 5).bool()}, {"2.weight": torch.ones(3, 5).bool()}),
    ],
)
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_of_two_masks_the_common_parameters_count(a, b, outputs):
    net = network()
    left = jacpot.jacobian(net, torch.randn(3, 4).double(), mask=a)
    right = jacpot.jacobian(net, torch.randn(2, 4).double(), mask=b)
    expected = (full(left) @ full(right).T).view(3, 3, 2, 3)
    if outputs != "full":
        expected = expected.diagonal(dim1=1, dim2=3)
    if outputs == "trace":
        expected = expected.sum(2)
    torch.testing.assert_close(left.gram(right, outputs), expected)


def test_nothing_in_common_is_zero():
    net = nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4)
    left, right = (jacpot.jacobian(net, x, mask={"weight": m}) for m in (HALF, ~HALF))
    assert not left.gram(right).any()


def test_convolutions_and_turned_weights():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2, groups=1)
    ).double()
    masks = [{"0.weight": some(2, 3, 2, 2), "2.weight": some(4, 3, 2, 2)} for _ in range(2)]
    x = torch.randn(2, 2, 3, 3).double()
    left, right = (jacpot.jacobian(net, x, mask=mask) for mask in masks)
    expected = (full(left) @ full(right).T).view(left.gram(right).shape)
    torch.testing.assert_close(left.gram(right), expected)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh()).sum(1)


@pytest.mark.parametrize("lengths", [(1, 40), (40, 2), (3, 4)])
def test_examples_of_other_lengths(lengths):
    """Few positions stay factors, many become rows, in an order of their own."""
    torch.manual_seed(0)
    net = Bag().double()
    left, right = (jacpot.jacobian(net, torch.randint(5, (2, n))) for n in lengths)
    expected = (full(left) @ full(right).T).view(2, 2, 2, 2)
    torch.testing.assert_close(left.gram(right), expected)


def test_other_parameters_are_refused():
    x = torch.randn(3, 4)
    left = jacpot.jacobian(nn.Linear(4, 6), x)
    with pytest.raises(ValueError, match=r"'other'.*same parameters.*'weight'"):
        left.gram(jacpot.jacobian(nn.Linear(3, 6), x[:, :3]))
    with pytest.raises(ValueError, match=r"'weight' has shape .6, 4. here and none there"):
        left.gram(jacpot.jacobian(nn.Sequential(nn.Linear(4, 6)), x))
