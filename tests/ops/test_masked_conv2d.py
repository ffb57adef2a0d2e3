"""The sparse convolution on every instruction set, and its derivatives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maps import assert_maps
from torch.nn import functional

import jacpot
from jacpot.ops.masked_conv2d import masked_conv2d, window_of


@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    image=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    examples=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    relu=st.booleans(),
)
def test_forward_and_gradients(
    device, channels, size, stride, padding, dilation, image, examples, density, dtype, relu
):
    mask = (torch.rand(*channels, *size) < density).to(device)
    window = window_of(mask.shape, stride, padding, dilation)
    pattern = jacpot.Pattern(window.flatten(mask))
    weight = (torch.randn(mask.shape, dtype=dtype).to(device) * mask).requires_grad_()
    values = weight.detach()[mask].requires_grad_()
    bias = torch.randn(channels[0], dtype=dtype).to(device)
    x = torch.randn(examples, channels[1], *image, dtype=dtype).to(device).requires_grad_()
    y = masked_conv2d(x, values, pattern, window, bias, relu=relu, method="sparse")
    expected = functional.conv2d(x, weight, bias, stride, padding, dilation)
    expected = expected.relu() if relu else expected
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, expected, **tolerance)
    seed = torch.randn(expected.shape, dtype=dtype).to(device)
    dx, dv = torch.autograd.grad(y, (x, values), seed, retain_graph=True)
    ex, ew = torch.autograd.grad(expected, (x, weight), seed)
    torch.testing.assert_close(dx, ex, **tolerance)
    torch.testing.assert_close(dv, ew[mask], **tolerance)
    (alone,) = torch.autograd.grad(y, x, seed)
    torch.testing.assert_close(alone, ex, **tolerance)


def small():
    torch.manual_seed(0)
    mask = torch.rand(3, 2, 2, 3) < 0.5
    window = window_of(mask.shape, (1, 2), 1)
    pattern = jacpot.Pattern(window.flatten(mask))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    return window, pattern, x, values, bias


def test_differentiates_twice():
    window, pattern, *arguments = small()

    def f(x, values, bias):
        return masked_conv2d(x, values, pattern, window, bias, method="sparse")

    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("relu", [False, True])
def test_forward_mode(relu):
    window, pattern, *arguments = small()

    def f(x, values, bias):
        return masked_conv2d(x, values, pattern, window, bias, relu=relu, method="sparse")

    assert torch.autograd.gradcheck(f, tuple(arguments), check_forward_ad=True)


def test_vmap():
    window, pattern, x, values, bias = (a.detach() if torch.is_tensor(a) else a for a in small())

    def f(x, values, bias):
        return masked_conv2d(x, values, pattern, window, bias, method="sparse")

    assert_maps(f, x, values, bias)


@pytest.mark.parametrize("method", ["sparse", "dense"])
def test_bfloat16_sums_in_float32(method):
    window, pattern, *arguments = small()
    narrow = [a.detach().bfloat16() for a in arguments]
    x, values, bias = narrow
    y = masked_conv2d(x, values, pattern, window, bias, method=method)
    wide = masked_conv2d(x.float(), values.float(), pattern, window, bias.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wide.bfloat16()) or method == "dense"
    torch.testing.assert_close(y, wide.bfloat16())


def test_operators_are_well_formed():
    window, pattern, x, values, bias = small()
    ops, pairs = torch.ops.jacpot, window.pairs()
    y = ops.masked_conv2d(x, values, bias, pattern.block, 3, True, pairs)
    torch.library.opcheck(
        ops.masked_conv2d.default, (x, values, bias, pattern.block, 3, True, pairs)
    )
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.masked_conv2d_backward.default,
            (torch.randn_like(y, requires_grad=True), x, values, pattern.block, *wants, pairs),
        )


def test_same_bits_at_any_number_of_threads():
    mask = torch.rand(24, 16, 3, 3) < 0.2
    window = window_of(mask.shape, padding=1)
    pattern = jacpot.Pattern(window.flatten(mask))
    x, values = torch.randn(8, 16, 14, 14), torch.randn(pattern.nnz)
    run = torch.ops.jacpot.masked_conv2d_backward
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = masked_conv2d(x, values, pattern, window, method="sparse")
            results.append((y, *run(y, x, values, pattern.block, True, True, window.pairs())))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_refusals():
    window, pattern, x, values, _ = small()
    run = torch.ops.jacpot.masked_conv2d
    with pytest.raises(ValueError, match="'pattern' must have 18 columns, got 12"):
        run(torch.ones(1, 3, 4, 5).double(), values, None, pattern.block, 3, False, window.pairs())
    with pytest.raises(TypeError, match="'values' must be float64 like 'x', got float32"):
        run(x, values.float(), None, pattern.block, 3, False, window.pairs())
