"""Max pooling with the channels innermost against torch's own, to the last bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jacpot.tangent import pooling


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


@given(pooled())
def test_pooling(problem):
    x, kernel, options = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "FEWEST_CHANNELS", 1)
        results = []
        for pool in (pooling.max_pool2d, F.max_pool2d):
            leaf = x.clone().requires_grad_()
            y = pool(leaf, kernel, **options)
            assert y.is_contiguous()
            g = torch.arange(3 * y.numel(), dtype=x.dtype).view(3, *y.shape)
            one = torch.autograd.grad(y, leaf, g[0], retain_graph=True)
            many = torch.autograd.grad(y, leaf, g, is_grads_batched=True)
            results.append((y.detach(), *one, *many))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)
