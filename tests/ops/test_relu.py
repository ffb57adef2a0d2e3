"""A ReLU whose signals go back several at once, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from jacpot.ops import relu as ours
from jacpot.tangent.backward import signals

SHAPES = [(0, 3), (1, 1), (7, 5), (300, 250), (260, 8, 6, 6)]  # the last two are large


def same(found, expected):
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_signals_are_zero_where_it_is_off(shape, dtype):
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    y = ours.relu(x)
    assert torch.equal(y, F.relu(x))
    given = torch.randn(3, *shape, dtype=dtype)
    given.view(-1)[:1] = float("nan")
    for some in (given, given[:1], given[:, :1].expand(3, *shape)):
        (found,) = signals(y, [x], some, known=True)
        assert same(found, torch.where(x > 0, some, 0))
        if y.numel() >= ours.LARGE:
            assert found.transpose(0, 1).is_contiguous()  # by example, as the layer before takes it
        (found,) = signals(y, [x], some, known=False)
        assert same(found, torch.where(x > 0, some, 0))
    (found,) = torch.autograd.grad(y, x, given[0])
    assert same(found, torch.where(x > 0, given[0], 0))


@pytest.mark.parametrize("shape", [(4, 3), (300, 250)])
def test_its_derivative_can_be_differentiated(shape):
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    signal = torch.randn(shape, dtype=torch.float64).requires_grad_()
    (once,) = torch.autograd.grad(ours.relu(x), x, signal, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), signal)
    assert torch.equal(twice, (x > 0).double())
