"""Every layer rule against torch.func, and what no rule covers against plain autograd."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import by_autograd, check_operations, dense, relative_error
from pieces import Of, linear, randn, tokens
from torch import nn

import jacpot
from jacpot.ops.jacobian import Factors
from jacpot.tangent.rules import RULES, Outer, Rows


def attention(**options):
    return nn.MultiheadAttention(6, 2, **options)


def tied():
    net = Of(lambda m, t: F.linear(m.tokens(t).tanh().mean(1), m.head.weight, m.head.bias),
             tokens=nn.Embedding(7, 6), head=linear(6, 7))  # fmt: skip
    net.head.weight = net.tokens.weight
    return net


COVERED = {
    "linear with positions": lambda: (nn.Sequential(linear(), nn.Tanh()), randn(4, 2, 3, 6)),
    "batch norm 1d": lambda: (nn.Sequential(linear(), nn.BatchNorm1d(6)).eval(), randn(4, 6)),
    "batch norm 3d": lambda: (nn.Sequential(nn.BatchNorm3d(2), nn.Tanh()).eval(),
                              randn(4, 2, 2, 3, 2)),
    "layer norm": lambda: (nn.Sequential(linear(), nn.LayerNorm(6), nn.Tanh()), randn(4, 3, 6)),
    "layer norm, two axes": lambda: (nn.Sequential(nn.LayerNorm((3, 6)), nn.Tanh()),
                                     randn(4, 3, 6)),
    "rms norm": lambda: (nn.Sequential(linear(), nn.RMSNorm(6), nn.Tanh()), randn(4, 3, 6)),
    "group norm": lambda: (nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()),
                           randn(4, 3, 6)),
    "instance norm": lambda: (nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Tanh()),
                              randn(4, 3, 5, 5)),
    "instance norm, running": lambda: (
        nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh())
        .eval(), randn(4, 3, 5)),
    "embedding": lambda: (Of(lambda m, t: m.e(t).tanh().mean(1), e=nn.Embedding(7, 3)),
                          tokens(4, 5)),
    "embedding, padded": lambda: (
        Of(lambda m, t: m.e(t).tanh().mean(1), e=nn.Embedding(7, 3, padding_idx=-2)),
        tokens(4, 5)),
    "bag, mean": lambda: (Of(lambda m, t: m.e(t).tanh(), e=nn.EmbeddingBag(7, 3, padding_idx=1)),
                          tokens(4, 5)),
    "bag, sum": lambda: (Of(lambda m, t: m.e(t).tanh(), e=nn.EmbeddingBag(7, 3, mode="sum")),
                         tokens(4, 5)),
    "bag, weighted": lambda: (
        Of(lambda m, t, w: m.e(t, per_sample_weights=w).tanh(),
           e=nn.EmbeddingBag(7, 3, mode="sum")), (tokens(4, 5), randn(4, 5))),
    "self-attention": lambda: (
        Of(lambda m, x: m.a(x, x, x, need_weights=False)[0].mean(1),
           a=attention(batch_first=True)), randn(4, 3, 6)),
    "sequence first": lambda: (
        Of(lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].mean(0), a=attention()), randn(4, 3, 6)),
    "encoder layer": lambda: (
        nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten()).eval(),
        randn(4, 3, 6)),
    "used twice": lambda: (Of(lambda m, x: m.a(m.a(x).relu()), a=linear()), randn(4, 6)),
    "used twice, at other sizes": lambda: (
        Of(lambda m, x: m.a(x).mean((2, 3)) + m.a(x[:, :, 1:]).amax((2, 3)), a=nn.Conv2d(2, 3, 2)),
        randn(4, 2, 5, 5)),
    "transposed, twice at one place": lambda: (
        Of(lambda m, x: m.a(m.a(x).tanh()), a=nn.ConvTranspose1d(2, 2, 1)), randn(4, 2, 1)),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), nn.Tanh(), nn.Flatten(),
                      linear(64, 2)), randn(4, 2, 2, 2)),
    "transposed, few places": lambda: (
        nn.Sequential(nn.ConvTranspose1d(3, 8, 2), nn.Tanh(), nn.Flatten(), linear(16, 2)),
        randn(4, 3, 1)),
    "functional": lambda: (Of(lambda m, x: F.linear(x.tanh(), m.w, m.b), w=randn(2, 6),
                              b=randn(2)), randn(4, 6)),
    "matmul": lambda: (Of(lambda m, x: torch.matmul(x @ m.w, m.v), w=randn(6, 2), v=randn(2, 3)),
                       randn(4, 6)),
    "addmm": lambda: (
        Of(lambda m, x: torch.addmm(m.b, x.view(-1, 6), m.w).view(len(x), -1).tanh(),
           w=randn(6, 2), b=randn(2)), randn(4, 3, 6)),
    "tied": lambda: (tied(), tokens(4, 5)),
    "several inputs": lambda: (Of(lambda m, x, y: m.a(x) * m.b(y).sin(), a=linear(), b=linear()),
                               (randn(4, 6), randn(4, 6))),
    "examples folded": lambda: (
        Of(lambda m, x: m.a(x.flatten(0, 1)).tanh().view(len(x), -1)[:, :7], a=nn.Conv2d(2, 3, 2)),
        randn(4, 3, 2, 4, 4)),
    "written to": lambda: (
        nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), nn.Tanh()), randn(4, 6)),
    "branch without effect": lambda: (Of(lambda m, x: m.a(x) + 0 * m.b(x).detach(), a=linear(),
                                         b=linear()), randn(4, 6)),
    "never used": lambda: (Of(lambda m, x: m.a(x), a=linear(), b=linear()), randn(4, 6)),
}  # fmt: skip

UNCOVERED = {
    "scale": lambda: (Of(lambda m, x: m.g * m.a(x), a=linear(), g=randn(6)), randn(4, 6)),
    "parameter as input": lambda: (
        Of(lambda m, x: m.a(x) + m.a(m.g), a=linear(), g=randn(6)), randn(4, 6)),
    "covered and not": lambda: (Of(lambda m, x: m.a(x).tanh() @ m.a.weight, a=linear()),
                                randn(4, 6)),
    "positions": lambda: (
        Of(lambda m, t: (m.e(t) + m.p(torch.arange(5, device=t.device))).tanh().mean(1),
           e=nn.Embedding(7, 3), p=nn.Embedding(5, 3)), tokens(4, 5)),
    "attention with its own tokens": lambda: (
        Of(lambda m, x: m.a(x, x, x)[0].mean(1),
           a=attention(batch_first=True, add_bias_kv=True, add_zero_attn=True)), randn(4, 3, 6)),
    "cross-attention": lambda: (Of(lambda m, x: m.a(x[:, :1], x, x)[0].mean(1),
                                   a=attention(batch_first=True)), randn(4, 3, 6)),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.Tanh()), randn(4, 6)),
    "prelu": lambda: (nn.Sequential(linear(), nn.PReLU(6)), randn(4, 6)),
    "bilinear": lambda: (Of(lambda m, x, y: m.b(x, y), b=nn.Bilinear(3, 2, 4)),
                         (randn(4, 3), randn(4, 2))),
    "bag, max": lambda: (Of(lambda m, t: m.e(t).tanh(), e=nn.EmbeddingBag(7, 3, mode="max")),
                         tokens(4, 5)),
    "packed": lambda: (
        Of(lambda m, x: m.h(m.r(nn.utils.rnn.pack_padded_sequence(
            x, [3] * len(x), batch_first=True))[1][0]), r=nn.GRU(6, 4), h=linear(4, 2)),
        randn(4, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("masked", [False, True])
def test_covered(name, masked):
    torch.manual_seed(4)
    net, x = COVERED[name]()
    net.double()
    mask = {k: torch.rand(p.shape) < 0.6 for k, p in net.named_parameters()} if masked else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = jacpot.jacobian(net, x, mask=mask)
    expected = dense(net, x, mask)
    first = tuple(part[:1] for part in x) if isinstance(x, tuple) else x[:1]
    check_operations(J, expected, jacpot.jacobian(net, first, mask=mask), expected[:1])


@pytest.mark.filterwarnings("ignore:.*has no layer rule")
@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered(name):
    torch.manual_seed(5)
    net, x = UNCOVERED[name]()
    net.double()
    expected = by_autograd(net, x)
    first = tuple(part[:1] for part in x) if isinstance(x, tuple) else x[:1]
    check_operations(jacpot.jacobian(net, x), expected, jacpot.jacobian(net, first), expected[:1])


def test_a_layer_without_rule_is_announced_once(monkeypatch):
    monkeypatch.setattr("jacpot.tangent.capture._announced", set())
    net, x = UNCOVERED["prelu"]()
    net.double()
    with pytest.warns(UserWarning, match=r"PReLU.*'1'.*register_layer_rule"):
        jacpot.jacobian(net, x)
    jacpot.jacobian(net, x)  # warnings are errors here


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(randn(2, 6)), nn.Parameter(randn(6, 2))

    def forward(self, x, *, sign=1):
        return sign * x @ self.down.T @ self.up.T


@pytest.mark.parametrize("masked", [False, True])
def test_a_rule_of_a_module_class(masked):
    def rule(signals, layer, x, *, sign=1):
        x, signals = sign * x[:, None, None], signals[:, :, None, None]
        return {
            "down": Outer(x, signals @ layer.up),
            "up": Outer(x @ layer.down.T, signals),
        }

    layer = LowRank()
    net = Of(lambda m, x: m.c(m.b(m.a(x).tanh(), sign=-1)), a=linear(), b=layer, c=linear(6, 2))
    net.double()
    x, before = randn(4, 6), dict(vars(layer))
    mask = {"b.up": torch.rand(6, 2) < 0.5, "c.weight": torch.rand(2, 6) < 0.5} if masked else None
    jacpot.register_layer_rule(LowRank)(rule)
    try:
        J = jacpot.jacobian(net, x, mask=mask)
    finally:
        del RULES[LowRank]
    assert all(isinstance(block, Factors) for block in J.blocks)
    assert relative_error(J.dense(), dense(net, x, mask)) < 1e-10
    assert vars(layer) == before
    with pytest.raises(TypeError, match="sees"):
        jacpot.register_layer_rule(LowRank)(lambda signals, layer: {})


class Passing(nn.Module):
    """Gives the very tensor that it sees, or a view of it."""

    def __init__(self, view):
        super().__init__()
        self.view, self.unused = view, nn.Parameter(randn(6))

    def forward(self, x):
        return x.view(-1, 6) if self.view else x


@pytest.mark.parametrize("view", [False, True])
def test_what_a_first_layer_passes_on_may_be_written_to(view):
    def rule(signals, layer, x):
        return {"unused": Rows(0 * signals)}

    net = nn.Sequential(Passing(view), nn.ReLU(inplace=True), linear()).double()
    x = randn(4, 6)
    before = x.clone()
    jacpot.register_layer_rule(Passing)(rule)
    try:
        J = jacpot.jacobian(net, x)
    finally:
        del RULES[Passing]
    assert torch.equal(x, before)
    assert relative_error(J.dense(), dense(net, x.clone())) < 1e-10


def test_equal_layers_are_one_block():
    net = Of(lambda m, x: m.a(m.a(x).relu()), a=linear()).double()
    (block,) = jacpot.jacobian(net, randn(4, 6)).blocks
    assert isinstance(block, Factors)
    assert (block.n_positions, block.bias) == (2, True)


def test_outputs_are_chosen():
    def give(m, x):
        return {"logits": m.a(x), "pair": (m.b(x), x)}

    net, x = Of(give, a=linear(), b=linear()).double(), randn(4, 6)
    J = jacpot.jacobian(net, x, output="logits")
    assert relative_error(J.dense(), dense(net, x, output=lambda r: r["logits"])) < 1e-10
    second = jacpot.jacobian(net, x, output=lambda r: r["pair"][0])
    assert relative_error(second.dense(), dense(net, x, output=lambda r: r["pair"][0])) < 1e-10
    with pytest.raises(TypeError, match="output="):
        jacpot.jacobian(net, x)


def test_gradients_of_a_loss():
    net, x = nn.Sequential(linear(6, 5), nn.Tanh(), linear(5, 3)).double(), randn(7, 6)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    J = jacpot.jacobian(
        net, x, output=lambda f, y: F.cross_entropy(f, y, reduction="none"), targets=y
    )
    assert J.n_outputs == 1
    for i in range(7):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        expected = torch.cat([g.flatten() for g in grads])
        assert relative_error(J.dense()[i, 0], expected) < 1e-10
