"""The products of a linear layer, on every instruction set, against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jacpot.ops import linear_layer
from jacpot.reference import linear_layer as reference

DTYPES = st.sampled_from([torch.float32, torch.float64])
# around the tiles' edges, and more rows than a part of the weight has
SIZES = st.one_of(st.integers(0, 20), st.integers(40, 60), st.just(520))


def tensor(seed, *shape, dtype, padded=False):
    generator = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    room = torch.randn(*rows, columns + 3 * padded, generator=generator, dtype=torch.float64)
    return room[..., :columns].to(dtype)


def assert_close(actual, expected, terms):
    tolerance = 4 * (terms + 4) * torch.finfo(actual.dtype).eps
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(st.integers(0, 9), SIZES, SIZES, DTYPES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_forward(each_isa, n, inputs, outputs, dtype, with_bias, padded, seed):
    x = tensor(seed, n, inputs, dtype=dtype, padded=padded)
    weight = tensor(seed + 1, outputs, inputs, dtype=dtype, padded=padded)
    bias = tensor(seed + 2, outputs, dtype=dtype) if with_bias else None
    actual = linear_layer.forward(x, weight, bias)
    assert_close(actual, reference.forward(x, weight, bias), 4 * inputs)


@given(
    st.integers(0, 4), st.integers(0, 18), SIZES, SIZES, DTYPES, st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_backward(each_isa, n, k, outputs, inputs, dtype, density, padded, seed):
    signals = tensor(seed, n, k, outputs, dtype=dtype, padded=padded)
    signals *= tensor(seed + 1, n, 1, outputs, dtype=dtype).abs() < 3 * density
    weight = tensor(seed + 2, outputs, inputs, dtype=dtype, padded=padded)
    actual = linear_layer.backward(signals, weight)
    assert_close(actual, reference.backward(signals, weight), 4 * outputs)


@given(st.sampled_from([float("inf"), float("-inf"), float("nan")]), st.integers(0, 99), DTYPES)
def test_what_is_not_finite_is_not_hidden_by_zeros(each_isa, bad, seed, dtype):
    signals = tensor(seed, 3, 4, 530, dtype=dtype) * (tensor(seed + 1, 3, 1, 530, dtype=dtype) > 0)
    weight = tensor(seed + 2, 530, 60, dtype=dtype)
    weight[7 * seed % 530, seed % 60] = bad
    actual = linear_layer.backward(signals, weight)
    assert_close(actual, reference.backward(signals, weight), 4 * 530)
    assert not actual[:, :, seed % 60].isfinite().all()
    x = tensor(seed, 3, 60, dtype=dtype)
    assert_close(linear_layer.forward(x, weight), reference.forward(x, weight), 4 * 60)


def test_nan_signals_stay():
    signals, weight = torch.zeros(2, 4, 30), torch.ones(30, 5)
    signals[1, 2, 3] = float("nan")
    actual = linear_layer.backward(signals, weight)
    assert actual[1, 2].isnan().all()
    assert actual.isnan().sum() == 5


def test_signals_may_lie_output_by_output():
    signals, weight = torch.randn(6, 3, 40).transpose(0, 1), torch.randn(40, 50)
    assert_close(linear_layer.backward(signals, weight), signals @ weight, 4 * 40)
    assert_close(
        linear_layer.backward(signals[..., ::2], weight[::2]), signals[..., ::2] @ weight[::2], 80
    )


@pytest.mark.parametrize("n", [3, 70])  # few examples, and more
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_is_differentiated_as_torchs(n, k, dtype):
    x = tensor(0, n, 90, dtype=dtype).requires_grad_()
    weights = [tensor(1, 80, 90, dtype=dtype), tensor(2, 60, 80, dtype=dtype)]
    cotangents = tensor(3, k, n, 60, dtype=dtype)

    def pulled_back(layer):
        y = layer(torch.relu(layer(x, weights[0], weights[0][:, 0])), weights[1])
        back = torch.func.vmap(lambda one: torch.autograd.grad(y, x, one, retain_graph=True)[0])
        return y, back(cotangents), torch.autograd.grad(y, x, cotangents[0])[0]

    for actual, expected in zip(
        pulled_back(linear_layer.linear), pulled_back(F.linear), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(5, 2, 90), torch.randn(80, 90), None),
        (torch.randn(90), torch.randn(80, 90), torch.randn(80)),
        (torch.randn(5, 9000), torch.randn(9000), None),
        (torch.randn(5, 90), torch.randn(80, 90), torch.randn(1)),
        (torch.randn(5, 90), torch.randn(80, 90, requires_grad=True), None),
        (torch.randn(5, 90).bfloat16(), torch.randn(80, 90).bfloat16(), None),
    ],
    ids=["positions", "one example", "one output", "one bias", "trained", "16 bits"],
)  # fmt: skip
def test_linear_leaves_other_calls_to_torch(x, weight, bias):
    actual, expected = linear_layer.linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(actual, expected)
    assert actual.requires_grad == expected.requires_grad


def test_refusals_name_the_argument():
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="'weight'"):
        linear_layer.forward(x, weight.T)
    with pytest.raises(ValueError, match="'bias'"):
        linear_layer.forward(x, weight, torch.zeros(3))
    with pytest.raises(TypeError, match="'weight'"):
        linear_layer.forward(x, weight.double())
    with pytest.raises(ValueError, match="'weight'"):
        linear_layer.backward(torch.zeros(2, 5, 3), weight)
    with pytest.raises(ValueError, match="'signals'"):
        linear_layer.backward(x, weight)
