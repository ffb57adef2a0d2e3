"""Max pooling against torch's own, to the last bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jacpot.ops.max_pool import max_pool2d
from jacpot.ops.relu import relu


@st.composite
def pooled(draw):
    """An input with ties and holes, and the window of a pooling that fits it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kernel, stride, dilation = (
        draw(st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))))
        for _ in range(3)
    )
    least = min(kernel) if isinstance(kernel, tuple) else kernel
    options = {
        "stride": draw(st.sampled_from([None, stride])),
        "padding": draw(st.integers(0, least // 2)),
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
    }
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 20)), *(draw(st.integers(7, 9)),) * 2
    x = torch.randint(-2, 3, shape, generator=generator).to(
        draw(st.sampled_from([torch.float32, torch.float64]))
    )
    if draw(st.booleans()):
        x[0, 0, 3, 3] = torch.nan
    return x, kernel, options


@given(pooled(), st.booleans())
def test_pooling(each_isa, problem, behind_relu):
    x, kernel, options = problem
    results = []
    for pool, own_relu in ((max_pool2d, relu), (F.max_pool2d, F.relu)):
        leaf = x.clone().requires_grad_()
        y = pool(own_relu(leaf) if behind_relu else leaf, kernel, **options)
        assert y.is_contiguous()
        g = torch.arange(3 * y.numel(), dtype=x.dtype).view(3, *y.shape)
        (one,) = torch.autograd.grad(y, leaf, g[0], retain_graph=True)
        back = torch.func.vmap(
            lambda c, y=y, leaf=leaf: torch.autograd.grad(y, leaf, c, retain_graph=True)[0]
        )
        results.append((y.detach(), one, back(g)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 8, 8), {"kernel_size": 2, "return_indices": True}),
        ((3, 8, 8), {"kernel_size": 2}),
        ((0, 3, 8, 8), {"kernel_size": 2}),
        ((1, 1, 20, 20), {"kernel_size": 16}),
        ((1, 1, 1, 9), {"kernel_size": (2, 2), "padding": (1, 0), "dilation": (2, 1)}),
    ],
)
def test_pooling_leaves_other_calls_to_torch(shape, options):
    x = torch.randn(shape, requires_grad=True)
    ours, torchs = max_pool2d(x, **options), F.max_pool2d(x, **options)
    if isinstance(ours, Tensor):
        ours, torchs = (ours,), (torchs,)
    for one, other in zip(ours, torchs, strict=True):
        assert torch.equal(one, other)
        assert type(one.grad_fn) is type(other.grad_fn)


@pytest.mark.parametrize("options", [{"kernel_size": 9}, {"kernel_size": 2, "padding": 2}])
def test_pooling_refuses_as_torch_does(options):
    with pytest.raises(RuntimeError):
        max_pool2d(torch.zeros(1, 1, 8, 8), **options)


def test_what_a_relu_had_may_be_written_to():
    def gradient(pool, own_relu):
        x = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4).requires_grad_()
        y = x * 2
        z = own_relu(y)
        y.mul_(-3)
        return torch.autograd.grad((pool(z, 2).sum() + y.square().sum()), x)[0]

    assert torch.equal(gradient(max_pool2d, relu), gradient(F.max_pool2d, F.relu))
