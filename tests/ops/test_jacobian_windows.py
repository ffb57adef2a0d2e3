"""The windows of a convolution and what they give with signals, against torch's own unfolding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacpot.ops import jacobian_windows
from jacpot.ops.jacobian_windows import Windows, windows
from jacpot.reference import jacobian as reference


@st.composite
def convolved(draw):
    """An input, and the kernel, stride and dilation of a convolution that fits it."""
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(3)
    )
    sizes = [
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)
    ]
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 3)), *sizes)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.arange(math.prod(shape), dtype=dtype).view(shape), kernel, stride, dilation


@given(convolved())
def test_windows(problem):
    x, kernel, stride, dilation = problem
    cut = x
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        cut = cut.unfold(axis, d * (k - 1) + 1, s)
        cut = cut[..., ::d]
    dims = len(kernel)  # (N, C, *places, *kernel)
    expected = cut.movedim(1, 1 + dims).flatten(1, dims).flatten(2)
    torch.testing.assert_close(windows(x, kernel, stride, dilation), expected)


def test_windows_of_some_examples():
    x = torch.randn(4, 6, 5, 5)
    every = Windows(x, (3, 2), (2, 1), (1, 2), groups=3)
    assert every.shape == every.written().shape == (4, 6, 3, 12)
    torch.testing.assert_close(every[1:3].written(), every.written()[1:3])


@st.composite
def filtered(draw):
    """Activations and signals of a convolution with a kernel of 3 x 3, laid out in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, k, g = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    o, i = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 16, 33, 70]))
    h, w = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    x = torch.randn(n, g * i, h + 2, w + 2, generator=generator, dtype=torch.float64)
    s = torch.randn(k, n, g, o, h * w, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # channels innermost
        s = s.transpose(3, 4).contiguous().transpose(3, 4)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return x.to(dtype), s.to(dtype).transpose(0, 1).movedim(4, 2), g


@pytest.mark.parametrize("always", [True, False])
@given(filtered())
def test_rows(each_isa, always, problem):
    x, signals, groups = problem
    fewest = 0 if always else 10**9
    every = Windows(x, (3, 3), (1, 1), (1, 1), groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobian_windows, "FEWEST_PLACES", fewest)
        patch.setattr(jacobian_windows, "FEWEST_CHANNELS", fewest)
        found = every.rows(signals)
    expected = reference.rows(every.written().double(), signals.double())
    assert found.dtype == x.dtype
    bound = {torch.float32: 2e-5, torch.float64: 5e-14}[x.dtype]
    scale = 1 + (expected.abs().max() if expected.numel() else 0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=float(bound * scale))
