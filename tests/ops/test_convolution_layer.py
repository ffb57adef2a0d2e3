"""Signals on their way back through a convolution, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jacpot.ops import convolution_layer
from jacpot.ops.convolution_layer import Geometry
from jacpot.ops.relu import relu

BOUND = {torch.float32: 5e-5, torch.float64: 1e-13}


def tensor(seed, *shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual, expected, dtype):
    actual, expected = actual.detach(), expected.detach()
    scale = 1 + (expected.abs().max() if expected.numel() else 0)
    assert actual.dtype == dtype
    atol = float(BOUND[dtype] * scale)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


THREE, ONE = st.just((3, 3)), st.just(1)


@st.composite
def pulled(draw, kernels=THREE, strides=ONE, dilations=ONE):
    """Signals in any order of examples and outputs, a weight, and what a ReLU gave, or None."""
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    o, i = (draw(st.sampled_from([1, 3, 8, 16, 20, 33, 70])) for _ in range(2))
    kernel = draw(kernels)
    stride, dilation = ((draw(own), draw(own)) for own in (strides, dilations))
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    reach = [d * (size - 1) + 1 for d, size in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(1, r - 2 * p), 21)) for r, p in zip(reach, padding, strict=True)]
    seed = draw(st.integers(0, 2**31))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    weight = tensor(seed + 2, o, i, *kernel, dtype=dtype)
    geometry = Geometry(stride, padding, dilation)
    image = torch.zeros(1, i, *size, dtype=dtype)
    places = F.conv2d(image, weight, None, stride, padding, dilation).shape[2:]
    signals = tensor(seed, n, k, o, *places, dtype=dtype)
    order = draw(st.sampled_from([(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 1, 3, 4, 2)]))
    back = sorted(range(5), key=order.__getitem__)
    signals = signals.permute(order).contiguous().permute(back)
    seen = tensor(seed + 1, n, i, *size, dtype=dtype).relu() if draw(st.booleans()) else None
    return signals, weight, size, seen, geometry


def check_backward(signals, weight, size, seen, geometry):
    n, k = signals.shape[:2]
    x = torch.zeros(n * k, weight.shape[1], *size, dtype=torch.float64, requires_grad=True)
    laid = geometry.stride, geometry.padding, geometry.dilation
    y = F.conv2d(x, weight.double(), None, *laid)
    (expected,) = torch.autograd.grad(y, x, signals.double().flatten(0, 1))
    expected = expected.unflatten(0, (n, k))
    if seen is not None:
        expected = expected * (seen[:, None] > 0)
    actual = convolution_layer.backward(signals, weight, size, seen, geometry)
    assert actual.is_contiguous()
    assert_close(actual, expected, signals.dtype)


@given(pulled())
def test_backward_by_filtering(each_isa, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_layer, "FEWEST_CHANNELS", 1)
        patch.setattr(convolution_layer, "FEWEST_TILES", 1)
        check_backward(*problem)


KERNELS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(pulled(KERNELS, st.integers(1, 3), st.integers(1, 2)))
def test_backward_by_plain_sums(each_isa, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_layer, "FEWEST_TILES", 10**9)
        check_backward(*problem)


def test_backward_of_large_images(each_isa):  # in several parts
    geometry = Geometry((2, 1), (3, 0), (1, 2))
    weight = tensor(0, 8, 40, 5, 3, dtype=torch.float64)
    seen = tensor(1, 1, 40, 71, 90, dtype=torch.float64).relu()
    check_backward(
        tensor(2, 1, 2, 8, 37, 86, dtype=torch.float64), weight, (71, 90), seen, geometry
    )


def network(conv2d, relu, x, weights, biases, options):
    y = x
    for weight, bias in zip(weights, biases, strict=True):
        y = relu(conv2d(y, weight, bias, **options))
    return y


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 0},
        {"padding": (2, 1)},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [2, 40])  # too few tiles for minimal filtering, and enough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv2d_is_differentiated_as_torchs(options, k, n, dtype):
    x = tensor(0, n, 9, 9, 8, dtype=dtype).requires_grad_()
    weights = [tensor(i, 12, c, 3, 3, dtype=dtype) / 10 for i, c in enumerate((9, 12))]
    biases = [None, tensor(5, 12, dtype=dtype)]

    def pulled_back(conv2d, relu):
        y = network(conv2d, relu, x, weights, biases, options)
        cotangents = tensor(3, k, *y.shape, dtype=dtype)
        back = torch.func.vmap(lambda one: torch.autograd.grad(y, x, one, retain_graph=True)[0])
        return y, back(cotangents), torch.autograd.grad(y, x, cotangents[0])[0]

    ours = pulled_back(convolution_layer.conv2d, relu)
    for actual, expected in zip(ours, pulled_back(F.conv2d, F.relu), strict=True):
        assert_close(actual, expected, dtype)


def test_what_a_relu_gave_may_go_several_ways():
    weight = tensor(0, 8, 8, 3, 3, dtype=torch.float64)
    x = tensor(1, 4, 8, 16, 16, dtype=torch.float64).requires_grad_()

    def gradient(conv2d, relu):
        y = x * 2
        z = relu(y)
        total = conv2d(z, weight, padding=1).square() + z.sin() + y
        return torch.autograd.grad(total.sum(), x)[0]

    ours = gradient(convolution_layer.conv2d, relu)
    assert_close(ours, gradient(F.conv2d, F.relu), torch.float64)


def test_what_a_relu_had_may_be_written_to():
    weight = tensor(0, 8, 8, 3, 3, dtype=torch.float64)
    x = tensor(1, 4, 8, 16, 16, dtype=torch.float64).requires_grad_()

    def gradient(conv2d, relu):
        y = x * 2
        z = relu(y)
        y.mul_(-3)
        return torch.autograd.grad((conv2d(z, weight, padding=1) + y).square().sum(), x)[0]

    ours = gradient(convolution_layer.conv2d, relu)
    assert_close(ours, gradient(F.conv2d, F.relu), torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"weight": tensor(0, 16, 8, 2, 2, dtype=torch.float32), "padding": "same"},
        {"weight": tensor(0, 16, 8, 3, 3, dtype=torch.float32).requires_grad_()},
        {"input": torch.zeros(0, 8, 6, 6, requires_grad=True)},
        {"input": torch.zeros(8, 6, 6, requires_grad=True)},
    ],
    ids=str,
)
def test_conv2d_leaves_other_calls_to_torch(options):
    groups = options.get("groups", 1)
    weight = tensor(0, 16, 8 // groups, 3, 3, dtype=torch.float32)
    x = tensor(1, 2, 8, 9, 9, dtype=torch.float32).requires_grad_()
    arguments = {"input": x, "weight": weight, **options}
    actual, expected = convolution_layer.conv2d(**arguments), F.conv2d(**arguments)
    assert torch.equal(actual, expected)
    assert type(actual.grad_fn) is type(expected.grad_fn)


def test_refusals_name_the_argument():
    signals, weight = torch.zeros(2, 3, 4, 5, 5), torch.zeros(4, 6, 3, 3)
    for size in ((4, 5), (7, 9), (8, 5)):
        with pytest.raises(ValueError, match="'out'"):
            convolution_layer.backward(signals, weight, size)
    with pytest.raises(ValueError, match="'out'"):
        convolution_layer.backward(signals, weight, (7, 7), geometry=Geometry(padding=(1, 1)))
    with pytest.raises(ValueError, match="'stride'"):
        convolution_layer.backward(signals, weight, (7, 7), geometry=Geometry(stride=(0, 1)))
    with pytest.raises(ValueError, match="'weight'"):
        convolution_layer.backward(signals, weight[:3], (7, 7))
    with pytest.raises(ValueError, match="'seen'"):
        convolution_layer.backward(signals, weight, (7, 7), torch.zeros(2, 4, 7, 7))
    with pytest.raises(TypeError, match="'weight'"):
        convolution_layer.backward(signals, weight.double(), (7, 7))
    with pytest.raises(ValueError, match="must not be empty"):
        convolution_layer.backward(signals[:0], weight, (7, 7))
    many = torch.zeros(20, 4, 8, 5, 5), torch.zeros(8, 8, 3, 3)
    for size in ((4, 5), (8, 5)):
        with pytest.raises(ValueError, match="'out'"):
            convolution_layer.backward(*many, size)
