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
def test_windows(any_device, problem):
    x, kernel, stride, dilation = problem
    cut = x
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        cut = cut.unfold(axis, d * (k - 1) + 1, s)
        cut = cut[..., ::d]
    dims = len(kernel)  # (N, C, *places, *kernel)
    expected = cut.movedim(1, 1 + dims).flatten(1, dims).flatten(2)
    got = windows(x.to(any_device), kernel, stride, dilation)
    torch.testing.assert_close(got.cpu(), expected)


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


@st.composite
def laid(draw):
    """Windows of any geometry, with signals laid out in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims - 1))
    kernel = (*kernel, draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 19])))
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    sizes = [
        d * (k - 1) + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation, strict=True)
    ]
    n, k, g = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    channels, o = g * draw(st.integers(1, 4)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(n, channels, *sizes, generator=generator, dtype=torch.float64)
    seen = Windows(x.to(dtype), kernel, stride, dilation, g)
    order = draw(st.permutations(range(5)))
    shape = (n, k, seen.shape[1], g, o)
    s = torch.randn([shape[axis] for axis in order], generator=generator, dtype=torch.float64)
    return seen, s.to(dtype).permute([order.index(axis) for axis in range(5)])


def check_plain_rows(seen, signals):
    expected = reference.rows(seen.written().double(), signals.double())
    n, k, p = expected.shape
    out = torch.full((n, k, p + 5), 7, dtype=seen.x.dtype)
    seen.write_rows(signals, out, 3)
    assert (out[:, :, :3] == 7).all()
    assert (out[:, :, p + 3 :] == 7).all()
    bound = 4 * torch.finfo(out.dtype).eps * (1 + math.sqrt(seen.shape[1]))
    scale = 1 + (expected.abs().max() if expected.numel() else 0)
    found = out[:, :, 3 : p + 3].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(bound * scale))


@given(laid())
def test_plain_rows(each_isa, problem):
    check_plain_rows(*problem)


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_rows_of_more_places_than_stay_in_cache(each_isa, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 130, 131, generator=generator)
    seen = Windows(x, (3, 5), (1, 1), (1, 1))
    signals = torch.randn(2, 2, 1, 4, seen.shape[1], generator=generator).movedim(4, 2)
    check_plain_rows(seen, signals)
