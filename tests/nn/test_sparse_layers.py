"""Masked and sparse layers: the masked dense layer in every respect but time and memory."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masking import masked_copy
from torch import nn

import jacpot
from jacpot.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear


def assert_same(sparse, network, dense, mask, x):
    """``sparse`` computes what ``network`` does, whose layer is ``dense``; so do its gradients."""
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    y, expected = sparse(x1), network(x2)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(expected)
    y.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(sparse.values.grad, dense.weight.grad[mask])
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    assert torch.equal(sparse.mask(), mask)


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    bias=st.booleans(),
    leading=st.sampled_from([(3,), (2, 3), (), (0,), (20,)]),
    layout=st.sampled_from(["row", "feature"]),
    relu=st.booleans(),
)
def test_sparse_linear_is_the_masked_linear(
    real_device, shape, density, bias, leading, layout, relu
):
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.float64).to(real_device)
    mask = torch.rand(shape).to(real_device) < density
    layer = SparseLinear.from_linear(linear, mask, relu=relu, layout=layout)
    dense = masked_copy(linear, mask)
    x = torch.randn(*leading, shape[1], dtype=torch.float64).to(real_device)
    assert_same(layer, nn.Sequential(dense, nn.ReLU()) if relu else dense, dense, mask, x)
    torch.testing.assert_close(layer.to_linear().weight, dense.weight)


@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    image=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    examples=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.1, 0.9]),
    bias=st.booleans(),
)
def test_sparse_conv2d_is_the_masked_conv2d(
    real_device, channels, groups, size, stride, padding, dilation, image, examples, density, bias
):
    conv = nn.Conv2d(
        channels[0] * groups,
        channels[1] * groups,
        size,
        stride,
        padding,
        dilation,
        groups,
        bias,
        dtype=torch.float64,
    ).to(real_device)
    mask = torch.rand(conv.weight.shape).to(real_device) < density
    layer = SparseConv2d.from_conv2d(conv, mask)
    dense = masked_copy(conv, mask)
    x = torch.randn(examples, channels[0] * groups, *image, dtype=torch.float64).to(real_device)
    assert_same(layer, dense, dense, mask, x)
    torch.testing.assert_close(layer.to_conv2d().weight, dense.weight)


def test_named_padding():
    x = torch.randn(2, 2, 7, 7)
    for padding, size in (("same", 3), ("valid", 2), ("same", 5)):
        conv = nn.Conv2d(2, 4, size, padding=padding, dilation=1 if size == 5 else 2)
        mask = torch.rand(conv.weight.shape) < 0.4
        torch.testing.assert_close(
            SparseConv2d.from_conv2d(conv, mask)(x), masked_copy(conv, mask)(x)
        )
    uneven = nn.Conv2d(2, 4, 2, padding="same")
    with pytest.raises(
        ValueError, match="must pad with zeros, both sides alike, got padding='same'"
    ):
        SparseConv2d.from_conv2d(uneven, torch.ones(4, 2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="'padding' must be an int or a pair of them, got 'same'"):
        SparseConv2d(mask, padding="same")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_states_copies_and_pickles(kind):
    if kind == "linear":
        make = lambda density: SparseLinear(torch.rand(6, 5) < density)  # noqa: E731
        x = torch.randn(3, 5)
    else:
        make = lambda density: SparseConv2d(torch.rand(6, 5, 3, 3) < density)  # noqa: E731
        x = torch.randn(3, 5, 7, 7)
    layer = make(0.4)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    assert set(layer.state_dict()) == {"block", "values", "bias"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(0.1)  # of another pattern
    fresh.load_state_dict(torch.load(buffer), assign=True)
    assert torch.equal(fresh(x), expected)
    assert torch.equal(fresh.mask(), layer.mask())
    assert fresh.density == layer.density
    assert "density=" in repr(layer)
    assert torch.equal(layer.double()(x.double()).float(), expected) or torch.allclose(
        layer(x.double()).float(), expected, atol=1e-5
    )


def test_loading_a_state_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"0\.block must have shape \(3, 2\), got \(4, 2\)"):
        nn.Sequential(SparseLinear(torch.rand(3, 2) < 0.5)).load_state_dict(
            nn.Sequential(SparseLinear(torch.rand(4, 2) < 0.5)).state_dict(), assign=True
        )


def test_moments_never_go_to_the_weights_of_another_pattern():
    torch.manual_seed(0)
    mask = torch.tensor([[True, False], [False, True]])
    layer, same, other = SparseLinear(mask), SparseLinear(mask), SparseLinear(~mask)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"another pattern.*assign=True"):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    values = layer.values
    layer.load_state_dict(same.state_dict())
    assert layer.values is values  # so the optimizer goes on
    layer.load_state_dict(other.state_dict(), assign=True)
    assert layer.values is not values
    assert torch.equal(layer.weight(), other.weight())


def test_masked_layers_follow_their_mask():
    linear = nn.Linear(5, 4)
    mask = torch.rand(4, 5) < 0.5
    layer = MaskedLinear.from_linear(linear, mask)
    assert layer.weight is linear.weight
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), masked_copy(linear, mask)(x))
    layer.mask.logical_not_()
    torch.testing.assert_close(layer(x), masked_copy(linear, ~mask)(x))
    assert torch.equal(layer.state_dict()["mask"], ~mask)
    layer(x).sum().backward()
    assert (layer.weight.grad[mask] == 0).all()
    torch.testing.assert_close(layer.to_linear()(x), layer(x))

    conv = nn.Conv2d(2, 4, 3, padding="same", groups=2)
    mask = torch.rand(conv.weight.shape) < 0.5
    masked = MaskedConv2d.from_conv2d(conv, mask)
    images = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(masked(images), masked_copy(conv, mask)(images))
    torch.testing.assert_close(masked.to_conv2d()(images), masked(images))
    with pytest.raises(TypeError, match="'mask' must be bool"):
        MaskedLinear(2, 3, mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"'mask' must have shape \(3, 2\), got \(2, 3\)"):
        MaskedLinear(2, 3, mask=torch.ones(2, 3, dtype=torch.bool))


def test_conv2d_refusals():
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'mask' must have shape"):
        SparseConv2d(mask[0])
    with pytest.raises(ValueError, match="'groups' must divide the 4 output channels, got 3"):
        SparseConv2d(mask, groups=3)
    with pytest.raises(ValueError, match="'stride' must be at least 1, got 0"):
        SparseConv2d(mask, stride=0)
    with pytest.raises(ValueError, match="must pad with zeros"):
        SparseConv2d.from_conv2d(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), mask)
    with pytest.raises(ValueError, match=r"'x' must have shape \(N, 2, height, width\)"):
        SparseConv2d(mask)(torch.ones(1, 3, 5, 5))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        SparseConv2d(mask)(torch.ones(1, 2, 2, 2))


def test_forced_methods_agree():
    pattern = jacpot.Pattern(torch.rand(30, 40) < 0.3)
    x, values, bias = torch.randn(20, 40), torch.randn(pattern.nnz), torch.randn(30)
    results = [
        jacpot.masked_matmul(x, values, pattern, bias, relu=relu, layout=layout, method=method)
        for relu in (False, True)
        for method in ("sparse", "dense", "auto")
        for layout in ("row", "feature")
    ]
    for i, result in enumerate(results):
        torch.testing.assert_close(result, results[i // 6 * 6])
        assert result.stride() == ((30, 1) if i % 2 == 0 else (1, 20))
    with pytest.raises(ValueError, match="'method' must be"):
        jacpot.masked_matmul(x, values, pattern, method="fast")


def test_arguments_of_another_type_are_refused():
    with pytest.raises(TypeError, match="'values' must be bfloat16 like 'x', got float32"):
        SparseConv2d(torch.ones(2, 2, 1, 1, dtype=torch.bool))(torch.ones(1, 2, 3, 3).bfloat16())
    for layer in (SparseConv2d(torch.ones(2, 2, 1, 1) > 0), SparseLinear(torch.ones(2, 2) > 0)):
        with pytest.raises(TypeError, match=r"'x' must be a torch\.Tensor, got ndarray"):
            layer(np.ones((2, 2)))
    with pytest.raises(ValueError, match="'layout' must be 'row' or 'feature', got 'foo'"):
        SparseLinear(torch.ones(2, 2, dtype=torch.bool), layout="foo")
