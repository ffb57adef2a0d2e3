"""The options of the layers that have a rule, against torch.func or, one by one, autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_autograd, dense, relative_error
from pieces import Of, linear, randn, tokens
from torch import nn

import jacpot


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    transposed = draw(st.booleans())

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    stride, dilation = each(1, 3), each(1, 2)
    options = {
        "kernel_size": each(1, 3), "stride": stride, "dilation": dilation, "groups": groups,
        "bias": draw(st.booleans()), "padding": each(0, 2),
    }  # fmt: skip
    if transposed:
        kind = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate",
                                                        "circular"]))  # fmt: skip
        if draw(st.booleans()):
            options["stride"] = 1
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
    layer = kind(2 * groups, groups * draw(st.integers(1, 2)), **options).double()
    size = draw(st.integers(5, 7))
    return layer, (2 * groups, *[size] * dims), draw(st.sampled_from([0, 1, 3]))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_convolution_options(case, masked):
    layer, shape, n = case
    torch.manual_seed(6)
    with torch.no_grad():
        try:
            features = layer(randn(1, *shape)).flatten(1).shape[1]
        except RuntimeError:  # padding that takes more than there is
            return
    if features == 0:
        return
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), linear(features, 2, dtype=torch.float64))
    agrees(net, randn(n, *shape), masked)


@st.composite
def normalisations(draw):
    """A layer that normalises in evaluation mode, and the shape of an example."""
    dims, channels = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    shape = (channels, *(draw(st.integers(2, 4)) for _ in range(dims)))
    eps = draw(st.sampled_from([1e-5, 0.1]))
    kind = draw(st.sampled_from(["batch", "instance", "group", "layer", "rms"]))
    if kind == "batch":
        layer = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](channels, eps)
    elif kind == "instance":
        of = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dims - 1]
        layer = of(channels, eps, affine=True, track_running_stats=draw(st.booleans()))
    elif kind == "group":
        layer = nn.GroupNorm(draw(st.sampled_from([1, 2, channels])), channels, eps)
    else:
        last = shape[draw(st.integers(1, dims)) :]
        layer = (
            nn.LayerNorm(last, eps, bias=draw(st.booleans()))
            if kind == "layer"
            else nn.RMSNorm(last, draw(st.sampled_from([None, eps])))
        )
    return layer, shape


@given(normalisations(), st.booleans(), st.sampled_from([0, 1, 3]))
@settings(max_examples=25)
def test_normalisation_options(case, masked, n):
    layer, shape = case
    torch.manual_seed(9)
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), linear(math.prod(shape), 2)).double().eval()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    agrees(net, randn(n, *shape), masked)


@given(
    dim=st.integers(1, 3), padding=st.sampled_from([None, 0, -1]), positions=st.integers(1, 4),
    mode=st.sampled_from([None, "sum", "mean"]), weighted=st.booleans(), masked=st.booleans(),
    n=st.sampled_from([0, 1, 3]),
)  # fmt: skip
@settings(max_examples=25)
def test_embedding_options(dim, padding, positions, mode, weighted, masked, n):
    torch.manual_seed(10)
    t = tokens(n, positions)
    if mode is None:
        agrees(Of(lambda m, t: m.e(t).tanh().mean(1), e=nn.Embedding(7, dim, padding)), t, masked)
    elif weighted and mode == "sum":
        bag = nn.EmbeddingBag(7, dim, mode=mode, padding_idx=padding)
        net = Of(lambda m, t, w: m.e(t, per_sample_weights=w).tanh(), e=bag)
        agrees(net, (t, randn(n, positions)), masked)
    else:
        bag = nn.EmbeddingBag(7, dim, mode=mode, padding_idx=padding)
        agrees(Of(lambda m, t: m.e(t).tanh(), e=bag), t, masked)


@given(
    heads=st.sampled_from([1, 2, 3]), bias=st.booleans(), batch_first=st.booleans(),
    causal=st.booleans(), weights=st.booleans(), masked=st.booleans(), n=st.sampled_from([0, 1, 3]),
)  # fmt: skip
@settings(max_examples=15)
def test_attention_options(heads, bias, batch_first, causal, weights, masked, n):
    torch.manual_seed(11)
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1) if causal else None

    def run(m, x):
        x = x if batch_first else x.transpose(0, 1)
        y = m.a(x, x, x, need_weights=weights, attn_mask=hidden)[0]
        return y.mean(1 if batch_first else 0)

    layer = nn.MultiheadAttention(6, heads, bias=bias, batch_first=batch_first)
    agrees(Of(run, a=layer), randn(n, 3, 6), masked)


def agrees(net, x, masked):
    """Compare the Jacobian with torch.func's; every layer has a rule, as warnings are errors."""
    net.double()
    mask = {k: torch.rand(p.shape) < 0.6 for k, p in net.named_parameters()} if masked else None
    J = jacpot.jacobian(net, x, mask=mask)
    if len(x[0] if isinstance(x, tuple) else x) == 0:
        assert J.dense().shape == (0, J.n_outputs, J.n_parameters)
    else:
        assert relative_error(J.dense(), dense(net, x, mask)) < 1e-10


@given(
    kind=st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]),
    options=st.fixed_dictionaries(
        {"num_layers": st.integers(1, 2), "bias": st.booleans(), "batch_first": st.booleans(),
         "bidirectional": st.booleans()}
    ),
    special=st.booleans(), start=st.booleans(), n=st.integers(0, 3), steps=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=30)
def test_recurrent_options(kind, options, special, start, n, steps):
    torch.manual_seed(7)
    if special and kind is not nn.GRU:
        options = {**options, **({"proj_size": 3} if kind is nn.LSTM else {"nonlinearity": "relu"})}
    layer, batch_first = kind(5, 4, **options), options["batch_first"]
    size, directions = options.get("proj_size", 4), 1 + options["bidirectional"]

    def run(m, x):
        h, c = (
            torch.full((options["num_layers"] * directions, len(x), width), 0.3, dtype=x.dtype)
            for width in (size, 4)
        )
        given = ((h, c) if kind is nn.LSTM else h) if start else None
        y, state = m.r(x if batch_first else x.transpose(0, 1), given)
        last = state if kind is not nn.LSTM else state[0] * state[1].mean(2, keepdim=True)
        return m.h(y.mean(1 if batch_first else 0)) + last.sum((0, 2)).unsqueeze(1)

    net = Of(run, r=layer, h=linear(size * directions, 2)).double()
    x = randn(n, steps, 5)
    J = jacpot.jacobian(net, x)
    if n == 0:
        assert J.dense().shape == (0, 2, J.n_parameters)
        return
    assert relative_error(J.outputs, net(x).detach()) < 1e-12
    assert relative_error(J.dense(), by_autograd(net, x)) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells(bias):
    torch.manual_seed(8)

    def run(m, x):
        h, c = m.c(m.b(m.a(x), m.a(x.cos())), (x.sin(), x.cos()))
        return h * c[:, :1]

    net = Of(run, a=nn.RNNCell(6, 6, bias, "relu"), b=nn.GRUCell(6, 6, bias),
             c=nn.LSTMCell(6, 6, bias)).double()  # fmt: skip
    x = randn(4, 6)
    J = jacpot.jacobian(net, x)
    assert relative_error(J.dense(), by_autograd(net, x)) < 1e-10
