"""Masked and sparse layers: the masked dense layer in every respect but time and memory."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jacpot
from jacpot.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear, sparsify


def masked_copy(layer, mask):
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense


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
    x = torch.randn(*leading, shape[1], dtype=torch.float64).to(real_device).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(x2)
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(expected)
    y.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[mask])
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert torch.equal(layer.mask(), mask)
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
    x = torch.randn(examples, channels[0] * groups, *image, dtype=torch.float64)
    x = x.to(real_device).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(x2)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(expected)
    y.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[mask])
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert torch.equal(layer.mask(), mask)
    torch.testing.assert_close(layer.to_conv2d().weight, dense.weight)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def masks_of(module, density=0.15):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in module.named_parameters()
        if p.dim() > 1
    }


def apply_masks(module, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)


def test_sparsify_keeps_outputs_and_trains_as_the_masked_network():
    dense = network()
    masks = masks_of(dense)
    untouched = copy.deepcopy(dense.state_dict())
    sparse = sparsify(dense, masks)
    assert all(torch.equal(v, untouched[k]) for k, v in dense.state_dict().items())
    apply_masks(dense, masks)
    x, target = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (dense, sparse)]
    for _ in range(5):
        for module, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), target).backward()
            if module is dense:
                for name, mask in masks.items():
                    module.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-3, atol=1e-4)
    moments = optimizers[1].state[sparse[5].values]["exp_avg"]
    assert moments.shape == (int(masks["5.weight"].sum()),)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("density", [0.15, 0.95])  # of which the second takes dense products
def test_linearization_is_that_of_the_masked_network(density):
    dense = network().double()
    masks = masks_of(dense, density)
    sparse = sparsify(dense, masks)
    apply_masks(dense, masks)
    x = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    step = {name: torch.randn_like(p) for name, p in dense.named_parameters()}
    kept = {
        (name[:-6] + "values" if name in masks else name): (
            value[masks[name]] if name in masks else value
        )
        for name, value in step.items()
    }

    def tangent(module, step):
        start = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.jvp(
            lambda p: torch.func.functional_call(module, p, (x,)), (start,), (step,)
        )[1]

    masked = {name: value * masks.get(name, 1) for name, value in step.items()}
    torch.testing.assert_close(tangent(sparse, kept), tangent(dense, masked))


def test_sparsify_takes_the_masks_of_masked_layers_and_leaves_the_rest():
    dense = network()
    masks = masks_of(dense)
    dense[5] = MaskedLinear.from_linear(dense[5], masks["5.weight"])
    dense[0] = MaskedConv2d.from_conv2d(dense[0], masks["0.weight"])
    x = torch.randn(4, 3, 8, 8)
    sparse = sparsify(dense)
    assert [type(sparse[i]) for i in (0, 2, 5, 7)] == [
        SparseConv2d,
        nn.Conv2d,
        SparseLinear,
        nn.Linear,
    ]
    torch.testing.assert_close(sparse(x), dense(x))
    only = sparsify(nn.Linear(3, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
    assert isinstance(only, SparseLinear)


def test_sparsify_swaps_a_shared_layer_everywhere():
    layer = nn.Linear(4, 4)
    both = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    sparse = sparsify(both, {"a.weight": torch.rand(4, 4) < 0.5})
    assert sparse["a"] is sparse["b"][0]
    assert isinstance(sparse["a"], SparseLinear)


def test_sparsify_keeps_what_is_shared():
    layer = nn.Linear(8, 8)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    mask = torch.rand(8, 8) < 0.4
    x = torch.randn(5, 8)
    sparse = sparsify(twice, {"0.weight": mask})
    assert sparse[0] is sparse[2]
    masked = nn.Sequential(masked_copy(layer, mask), nn.ReLU(), masked_copy(layer, mask))
    torch.testing.assert_close(sparse(x), masked(x))

    tied = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    for names in (["0.weight"], ["2.weight"], ["0.weight", "2.weight"]):
        sparse = sparsify(tied, dict.fromkeys(names, mask))
        assert sparse[0].values is sparse[2].values
        assert sparse[0].bias is sparse[2].bias
        masked = nn.Sequential(
            *(masked_copy(tied[i], mask) if i != 1 else tied[1] for i in (0, 1, 2))
        )
        torch.testing.assert_close(sparse(x), masked(x))
    with pytest.raises(ValueError, match=r"one mask for '2\.weight' and '0\.weight'"):
        sparsify(tied, {"0.weight": mask, "2.weight": ~mask})
    head = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    head[1].weight = head[0].weight
    with pytest.raises(ValueError, match="of Embedding, cannot be made sparse"):
        sparsify(head, {"1.weight": mask})


def test_sparsify_keeps_hooks():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(lambda layer, args, y: y + 1)
    net[0].register_forward_pre_hook(
        lambda layer, args, kwargs: ((args[0] * 2,), {}), with_kwargs=True
    )
    full = torch.ones(4, 4, dtype=torch.bool)
    x = torch.randn(3, 4)
    torch.testing.assert_close(sparsify(net, {"0.weight": full})(x), net(x))


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


def test_sparsify_refuses_what_it_cannot_swap():
    with pytest.raises(ValueError, match="must name parameters of the module, got 'none'"):
        sparsify(nn.Linear(2, 2), {"none": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 'weight', got \(2, 3\)"):
        sparsify(nn.Linear(2, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'bias', of Linear, cannot be made sparse"):
        sparsify(nn.Linear(2, 2), {"bias": torch.ones(2, dtype=torch.bool)})
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"out_proj.weight.* cannot be made sparse"):
        sparsify(attention, {"out_proj.weight": torch.ones(4, 4, dtype=torch.bool)})


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


def test_compiles_without_graph_breaks():
    sparse = sparsify(network(), masks_of(network()))
    sparse[5].layout = "feature"
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for examples in (4, 7):
        x = torch.randn(examples, 3, 8, 8)
        torch.testing.assert_close(compiled(x), sparse(x))
        expected = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), list(sparse.parameters()))
        torch.testing.assert_close(actual, expected)


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


def test_autocast_hands_sparse_layers_what_dense_ones_give():
    sparse = sparsify(network(), {"2.weight": masks_of(network())["2.weight"]})
    sparse = sparsify(sparse, {"7.weight": masks_of(network())["7.weight"]})
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), sparse(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert sparse[7].values.grad.dtype == torch.float32


def test_arguments_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"'module' must be an nn\.Module, got list"):
        sparsify([])
    with pytest.raises(TypeError, match="'mask' must be a mapping"):
        sparsify(nn.Linear(2, 2), [])
    with pytest.raises(TypeError, match="'values' must be bfloat16 like 'x', got float32"):
        SparseConv2d(torch.ones(2, 2, 1, 1, dtype=torch.bool))(torch.ones(1, 2, 3, 3).bfloat16())
    with pytest.raises(ValueError, match="'layout' must be 'row' or 'feature', got 'foo'"):
        SparseLinear(torch.ones(2, 2, dtype=torch.bool), layout="foo")
