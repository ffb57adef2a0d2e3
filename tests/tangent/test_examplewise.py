"""The proof that a network treats its examples one by one: never given for one that does not."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import build

from jacpot.tangent.examplewise import follow
from jacpot.tangent.network import Network, recording
from jacpot.tangent.probe import probe, stand_in


def proof(module, x, targets=None, output=None):
    with recording():
        return follow(Network(module, output=output), stand_in(x, 2), stand_in(targets, 2))


class Then(nn.Module):
    """A linear layer, and then some function, which may use a parameter and a buffer."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(4, dtype=torch.float64))
        self.function = function

    def forward(self, x):
        return self.function(self, self.fc(x))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "vgg11_bn", "resnet18", "resnet20"])
def test_tells_what_a_trial_tells(name, monkeypatch):
    net, x = build(name)
    with recording():
        proven = probe(Network(net), x)
        monkeypatch.setattr("jacpot.tangent.probe.follow", lambda *_: None)
        tried = probe(Network(net), x)
    assert proof(net, x) is not None
    for value in ("n_outputs", "uncovered", "bytes_per_example", "reduces", "writes_input"):
        assert getattr(proven, value) == getattr(tried, value)
    for found, expected in zip(proven.axes, tried.axes, strict=True):
        assert found.items() <= expected.items()


PROVEN = {
    "residual": lambda net, h: h + F.relu(net.fc(h)),
    "in place": lambda net, h: h.clone().add_(1).mul_(2).relu_(),
    "constants": lambda net, h: (1 - h) * net.shift / 3,
    "reshaped": lambda net, h: h.view(len(h), 2, 2).mean(2).flatten(1),
    "other axes": lambda net, h: h.softmax(-1)[:, None, 1:],
    "dropout that is off": lambda net, h: F.dropout(h, 0.5, training=False),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proves(name):
    assert proof(Then(PROVEN[name]), torch.ones(5, 4, dtype=torch.float64)) is not None


def test_proves_losses():
    def loss(scores, y):
        return F.cross_entropy(scores, y, reduction="none")

    def mean_loss(scores, y):
        return loss(scores, y) + F.cross_entropy(scores, y)

    net, x, y = nn.Linear(4, 3), torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
    assert proof(net, x, y, loss) is not None
    assert proof(net, x, y, mean_loss) is None


def with_numpy(net, h):
    return h + torch.from_numpy(h.detach().numpy()).mean()


class Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h - h.mean(0)


def by_value(net, h):
    return h if h.sum() > 0 else -h


def hidden(net, h):
    try:
        return h - h.mean(0)
    except NotImplementedError:
        return h


NOT_PROVEN = {
    "mean over examples": lambda net, h: h - h.mean(0),
    "mean over all": lambda net, h: h - h.mean(),
    "softmax over examples": lambda net, h: F.softmax(h, 0),
    "batch normalisation": lambda net, h: F.batch_norm(h, None, None, training=True),
    "the next example": lambda net, h: h + h.roll(1, 0),
    "broadcast examples": lambda net, h: h[:, :2] + h[:, 0],
    "transposed": lambda net, h: h.T.reshape(len(h), -1),
    "merged": lambda net, h: h.flatten().view(len(h), -1),
    "one for all": lambda net, h: h + h[0],
    "dropout": lambda net, h: F.dropout(h, 0.5),
    "torch's dice": lambda net, h: h + torch.rand(4, dtype=h.dtype),
    "dice": lambda net, h: h * random.random(),
    "dice for the course": lambda net, h: h.relu() if random.random() < 0.5 else h.tanh(),
    "a tensor from nowhere": lambda net, h: h + torch.ones(4, dtype=h.dtype),
    "numpy": with_numpy,
    "a function of its own": lambda net, h: Mean.apply(h),
    "the course depends on values": by_value,
    "exceptions caught": hidden,
    "a parameter without rule": lambda net, h: h * net.scale,
}


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_does_not_prove(name):
    net, x = Then(NOT_PROVEN[name]), torch.ones(5, 4, dtype=torch.float64)
    assert any(proof(net, x) is None for _ in range(20))  # one run of dice may repeat the last


STEPS = [
    lambda h, w: h.flatten(1), lambda h, w: h.flatten(), lambda h, w: h.view(h.shape[0], 4, -1),
    lambda h, w: h.view(4, h.shape[0], -1), lambda h, w: h.reshape(-1, 2),
    lambda h, w: h.unsqueeze(0), lambda h, w: h.unsqueeze(1), lambda h, w: h.squeeze(),
    lambda h, w: h[:, :2], lambda h, w: h[:, None], lambda h, w: h[:, 0], lambda h, w: h[1:],
    lambda h, w: h.sum(1), lambda h, w: h.mean(0, keepdim=True), lambda h, w: h.sum(-1),
    lambda h, w: h + h.sum(1), lambda h, w: h * h.sum(1, keepdim=True), lambda h, w: h + w,
    lambda h, w: h + h.transpose(0, 1), lambda h, w: h.softmax(1), lambda h, w: h.relu(),
    lambda h, w: F.layer_norm(h, h.shape[1:]), lambda h, w: F.layer_norm(h, h.shape),
    lambda h, w: F.avg_pool1d(h, 2), lambda h, w: F.max_pool2d(h, 2), lambda h, w: F.pad(h, (1, 1)),
    lambda h, w: F.pad(h, (0, 0, 1, 1)), lambda h, w: F.group_norm(h, 2),
    lambda h, w: F.linear(h, w[:, None].expand(-1, h.shape[-1])),
]  # fmt: skip


@given(st.lists(st.sampled_from(STEPS), max_size=4), st.integers(2, 5))
@settings(max_examples=150)
def test_what_is_proven_is_true(steps, n):
    def function(net, h):
        for step in steps:
            h = step(h, net.shift)
        return h.reshape(h.shape[0], -1)

    net = Then(function)
    torch.manual_seed(n)
    x = torch.randn(n, 4, 4, dtype=torch.float64)
    assume(proof(net, x) is not None)
    try:
        outputs = net(x)
    except (RuntimeError, ValueError, IndexError):
        return  # it cannot take so many examples
    for i in range(n):
        other = torch.randn_like(x)
        other[i] = x[i]
        torch.testing.assert_close(net(other)[i], outputs[i])
