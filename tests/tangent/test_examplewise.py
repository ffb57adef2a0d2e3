"""The proof that a network treats its examples one by one: never given for one that does not."""

import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import build

import jacpot
from jacpot.tangent.examplewise import follow
from jacpot.tangent.network import Network, recording
from jacpot.tangent.probe import probe, stand_in


def proof(module, x, targets=None, output=None):
    with recording():
        return follow(Network(module, output=output), stand_in(x, 7), stand_in(targets, 7))


class Then(nn.Module):
    """A linear layer, and then some function, which may use a parameter and a buffer."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(4, dtype=torch.float64))
        self.register_buffer("places", torch.tensor([1, 0]))
        self.function = function

    def forward(self, x):
        return self.function(self, self.fc(x))


class Whole(Then):
    """The function, which may use a linear layer, is all that is done."""

    def forward(self, x):
        return self.function(self, x)


def dense(net, x):
    """The Jacobian (N, K, P) from a run of all examples."""
    outputs = net(x)
    parameters = list(net.parameters())
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True)
        for f in outputs.flatten()
    ]
    flat = [torch.cat([gradient.flatten() for gradient in row]) for row in rows]
    return torch.stack(flat).view(*outputs.shape, -1)


class Gone:
    def __call__(self, outputs):
        return outputs.tanh()


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


PROVEN = {
    "residual": lambda net, h: h + F.relu(net.fc(h)),
    "in place": lambda net, h: h.clone().add_(1).mul_(2).relu_(),
    "constants": lambda net, h: (1 - h) * net.shift / 3,
    "reshaped": lambda net, h: h.view(len(h), 2, 2).mean(2).flatten(1),
    "other axes": lambda net, h: h.softmax(-1)[:, None, 1:],
    "dropout that is off": lambda net, h: F.dropout(h, 0.5, training=False),
    "merged and back": lambda net, h: h.flatten().view(len(h), -1),
    "there and back": lambda net, h: h.T.relu().T,
    "positions first": lambda net, h: h.view(-1, 2, 2).permute(1, 0, 2).sum(0),
    "windows": lambda net, h: h.view(len(h) * 2, 2).softmax(1).view(len(h), -1),
    "rounds": lambda net, h: h.T.reshape(-1, 1).relu().view(4, len(h)).T,
    "stacked": lambda net, h: torch.stack([h, h.tanh()]).sum(0),
    "joined with one for all": lambda net, h: torch.cat([h, net.scale.expand(len(h), -1)], 1),
    "parts": lambda net, h: torch.cat([part.relu() for part in h.chunk(2, 1)], 1),
    "unpacked": lambda net, h: torch.stack([part.relu() for part in h.T], 1),
    "picked": lambda net, h: h[:, [0, -1]] + h[:, net.places] + h.index_select(1, net.places),
    "other axes turned": lambda net, h: h.roll(1, 1).flip(-1).cumsum(1).sort(1).values,
    "attention": lambda net, h: F.scaled_dot_product_attention(*[h[:, None, :, None]] * 3).flatten(
        1
    ),
    "einsum": lambda net, h: torch.einsum("ni,nj,ij->nj", h, h, net.shift.outer(net.shift)),
    "masked": lambda net, h: h.masked_fill(net.places.eq(0).repeat(2), 0.0),
    "a state of zeros": lambda net, h: h + torch.zeros(len(h), 4, dtype=h.dtype),
    "a parameter": lambda net, h: (h * net.scale.exp()) @ net.scale.outer(net.scale),
    "a parameter in place": lambda net, h: h.tanh().mul_(net.scale).add_(net.scale),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proves(name):
    assert proof(Then(PROVEN[name]), torch.ones(5, 4, dtype=torch.float64)) is not None


def test_proves_pooling_of_many_channels():  # which a function of our own does faster
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    assert proof(net, torch.ones(5, 3, 8, 8)) is not None


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


def recurrent_over_examples(net, h):
    return nn.GRU(4, 4, dtype=h.dtype)(h[:, None])[0][:, 0]


def attention_over_examples(net, h):  # what batch_first=False does to (n, t, e)
    return F.scaled_dot_product_attention(*[h.view(-1, 2, 2).transpose(0, 1)] * 3).transpose(0, 1)


def written_to(net, h):
    h[0] = h[1]
    return h


MIXING = {
    "mean over examples": lambda net, h: h - h.mean(0),
    "mean over all": lambda net, h: h - h.mean(),
    "deviation, by a flag": lambda net, h: h * h.T.std(False),
    "softmax over examples": lambda net, h: F.softmax(h, 0),
    "normalised over examples": lambda net, h: F.normalize(h, dim=0),
    "batch normalisation": lambda net, h: F.batch_norm(h, None, None, training=True),
    "the next example": lambda net, h: h + h.roll(1, 0),
    "the last first": lambda net, h: h - h.flip(0),
    "sums so far": lambda net, h: h.cumsum(0),
    "sorted": lambda net, h: h.sort(0).values,
    "the greatest": lambda net, h: h - h.max(0).values,
    "broadcast examples": lambda net, h: h[:, :2] + h[:, 0].unsqueeze(0).mT[:1],
    "transposed": lambda net, h: h.T.reshape(len(h), -1),
    "permuted": lambda net, h: h.view(-1, 2, 2).permute(1, 0, 2).reshape(len(h), -1),
    "neighbours": lambda net, h: h.view(-1, 2, 4, 1).sum(1).repeat_interleave(2, 0)[..., 0],
    "repeated": lambda net, h: h.repeat(2, 1).view(len(h), -1),
    "joined": lambda net, h: torch.cat([h[1:], h[:1]], 0),
    "halves": lambda net, h: torch.cat(h.chunk(2, 0)[::-1], 0),
    "stacked": lambda net, h: torch.stack([h, h]).view(len(h), -1),
    "unpacked": lambda net, h: torch.stack([row - next(iter(h)) for row in h]),
    "one for all": lambda net, h: h + h[0],
    "picked": lambda net, h: h[net.places.repeat(len(h))[: len(h)]],
    "selected": lambda net, h: h + h.index_select(0, net.places[:1]),
    "by rank": lambda net, h: h[h[:, 0].argsort()],
    "written to": written_to,
    "products of examples": lambda net, h: h + (h @ h.T).mean(1, keepdim=True),
    "einsum": lambda net, h: torch.einsum("ni,mi->n", h, h)[:, None] + h,
    "einsum of a diagonal": lambda net, h: h + torch.einsum("nn->n", h @ h.T)[:1],
    "distances": lambda net, h: h + torch.cdist(h, h).sum(1, keepdim=True),
    "losses of all pairs": lambda net, h: (
        F.mse_loss(h[:, :1].expand(-1, len(h)), h[:, 0].expand(len(h), -1), reduction="none").sum(
            1, keepdim=True
        )
        + h
    ),
    "attention over examples": attention_over_examples,
    "a sequence of examples": recurrent_over_examples,
    "pooled": lambda net, h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "triangle": lambda net, h: torch.ones(len(h), len(h), dtype=h.dtype).tril() @ h,
}

NOT_PROVEN = {
    **MIXING,
    "dropout": lambda net, h: F.dropout(h, 0.5),
    "dropout of a weight": lambda net, h: h * F.dropout(net.shift, 0.5),
    "torch's dice": lambda net, h: h + torch.rand(4, dtype=h.dtype),
    "a tensor from nowhere": lambda net, h: h + torch.tensor([1.0], dtype=h.dtype),
    "numpy": with_numpy,
    "a function of its own": lambda net, h: Mean.apply(h),
    "the course depends on values": by_value,
    "exceptions caught": hidden,
}


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_does_not_prove(name):
    assert proof(Then(NOT_PROVEN[name]), torch.ones(5, 4, dtype=torch.float64)) is None


@pytest.mark.parametrize("name", MIXING)
def test_refuses(name):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="one by one"):
        jacpot.jacobian(Then(MIXING[name]), torch.randn(6, 4, dtype=torch.float64))


DICE = {
    "a number": lambda net, h: h * random.random(),
    "the course": lambda net, h: h.relu() if random.random() < 0.5 else h.tanh(),
    "how many steps": lambda net, h: h.relu() if random.random() < 0.5 else h.relu().tanh(),
}


@pytest.mark.parametrize("name", DICE)
def test_refuses_dice_that_torch_does_not_see(name):
    net, x = Then(DICE[name]), torch.ones(5, 4, dtype=torch.float64)

    def often():  # one run may repeat the last
        for _ in range(40):
            jacpot.jacobian(net, x)

    with pytest.raises(ValueError, match="chance"):
        often()


LARGE = {
    "the course": lambda net, h: h - h.mean(0) if len(h) > 8 else h,
    "how far": lambda net, h: h.roll(len(h) // 8, 0),
}


@pytest.mark.parametrize("name", LARGE)
def test_refuses_what_only_many_examples_show(name):
    with pytest.raises(ValueError, match="one by one"):
        jacpot.jacobian(Then(LARGE[name]), torch.randn(12, 4, dtype=torch.float64))


COUNTING = {
    "a share of the loss": lambda net, h: h / len(h),
    "one more": lambda net, h: h + torch.zeros(len(h) + 1, 4, dtype=h.dtype).sum(0),
    "another course": lambda net, h: h.tanh() if len(h) > 8 else h,
}


@pytest.mark.parametrize("name", COUNTING)
def test_the_number_of_examples_may_be_used(name):
    net = Then(COUNTING[name])
    for n in (12, 12, 5, 9):
        x = torch.randn(n, 4, dtype=torch.float64)
        torch.testing.assert_close(jacpot.jacobian(net, x).dense(), dense(net, x))


def written_input(net, x):
    x.mul_(2)
    return net.fc(x)


class Steeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


# What a module is first, and what it becomes.
BECOMES = {
    "mixing": (lambda net, x: net.fc(x).roll(0, 0), lambda net, x: net.fc(x).roll(1, 0)),
    "mixing by an index": (
        lambda net, x: net.fc(x)[torch.arange(len(x))],
        lambda net, x: net.fc(x)[torch.arange(len(x)).flip(0)],
    ),
    "mixing in the end": (
        lambda net, x: net.fc(x).relu(),
        lambda net, x: net.fc(x).relu() - net.fc(x).relu().mean(0),
    ),
}
STAYS = {
    "writing its input": (lambda net, x: net.fc(x), written_input),
    "another": (lambda net, x: net.fc(x).relu(), lambda net, x: net.fc(x).tanh()),
    "shorter": (lambda net, x: net.fc(net.fc(x)), lambda net, x: net.fc(x)),
    "narrower": (lambda net, x: net.fc(x), lambda net, x: net.fc(x)[:, :2]),
    "as narrow": (lambda net, x: net.fc(x)[:, :3], lambda net, x: net.fc(x)[:, 1:]),
    "of an unknown function": (
        lambda net, x: net.fc(x),
        lambda net, x: torch.erfinv(net.fc(x) / 9),
    ),
}


@pytest.mark.parametrize("name", BECOMES)
def test_what_is_remembered_is_no_proof(name):
    x = torch.randn(6, 4, dtype=torch.float64)
    net = Whole(BECOMES[name][0])
    for _ in range(2):
        torch.testing.assert_close(jacpot.jacobian(net, x).dense(), dense(net, x))
    net.function = BECOMES[name][1]
    for _ in range(2):
        with pytest.raises(ValueError, match="one by one"):
            jacpot.jacobian(net, x)


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.filterwarnings("ignore:.*has no layer rule")
def test_a_module_may_change(name):
    x = torch.randn(6, 4, dtype=torch.float64)
    net, before = Whole(STAYS[name][0]), x.clone()
    for function in (*STAYS[name], *STAYS[name]):
        net.function = function
        expected = dense(net, x.clone())
        torch.testing.assert_close(jacpot.jacobian(net, x).dense(), expected)
        kernel = torch.einsum("nkp,mkp->nm", expected, expected)
        torch.testing.assert_close(jacpot.ntk(net, x, outputs="trace", batch_size=4), kernel)
        assert torch.equal(x, before)


def test_a_module_may_get_derivatives_of_its_own():  # which no function that it calls shows
    x = torch.randn(6, 4, dtype=torch.float64)
    net = Whole(lambda net, x: net.fc(x) + 1)
    plain = jacpot.jacobian(net, x).dense()
    net.function = lambda net, x: Steeper.apply(net.fc(x) + 1)
    torch.testing.assert_close(jacpot.jacobian(net, x).dense(), 2 * plain)


def test_remembers_no_module_and_no_function():
    net, output = nn.Linear(4, 3), Gone()
    jacpot.jacobian(net, torch.randn(5, 4), output=output)
    gone = weakref.ref(net), weakref.ref(output)
    del net, output
    assert [there() for there in gone] == [None, None]


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
    lambda h, w: h.transpose(0, 1), lambda h, w: h.transpose(1, 2), lambda h, w: h.transpose(0, 2),
    lambda h, w: h.permute(2, 0, 1), lambda h, w: h.movedim(1, 0), lambda h, w: h.T,
    lambda h, w: h.reshape(h.shape[0], -1), lambda h, w: h.reshape(-1, h.shape[-1]),
    lambda h, w: h.unflatten(0, (-1, 2)), lambda h, w: h.flatten(0, 1), lambda h, w: h.unbind(1)[0],
    lambda h, w: torch.cat(h.chunk(2, 1)[::-1], 1), lambda h, w: torch.cat(h.chunk(2, 0)[::-1], 0),
    lambda h, w: torch.stack([h, h.relu()], 1), lambda h, w: torch.stack([h, h.relu()]),
    lambda h, w: h.roll(1, 0), lambda h, w: h.roll(1, 1), lambda h, w: h.flip(0),
    lambda h, w: h.flip(-1), lambda h, w: h.repeat(2, *[1] * (h.ndim - 1)),
    lambda h, w: h.repeat_interleave(2, 0), lambda h, w: h.cumsum(0), lambda h, w: h.cumsum(-1),
    lambda h, w: h[:, [-1, 0]], lambda h, w: h[[-1, 0]], lambda h, w: h[..., w[:2].long()],
    lambda h, w: h[w[:2].long()], lambda h, w: h.index_select(1, w[:2].long()),
    lambda h, w: h @ w.outer(w), lambda h, w: w.outer(w) @ h, lambda h, w: h @ w,
    lambda h, w: h @ h.mT, lambda h, w: h.mT @ h, lambda h, w: torch.matmul(h, h),
    lambda h, w: h.max(0).values, lambda h, w: h.max(1).values, lambda h, w: h.sort(1).values,
    lambda h, w: F.normalize(h), lambda h, w: h.std(1), lambda h, w: h.std(0),
    lambda h, w: F.scaled_dot_product_attention(h, h, h), lambda h, w: F.glu(h, 1),
    lambda h, w: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0],
    lambda h, w: torch.einsum("abc,abd->acd", h, h), lambda h, w: torch.einsum("abc,dbc->ad", h, h),
    lambda h, w: h + torch.zeros(h.shape[0], 1, 1, dtype=h.dtype), lambda h, w: h.mul(w).add_(1),
    lambda h, w: torch.where(h > 0, h, h.flip(0)), lambda h, w: h.masked_fill(h > 0, 0.5),
    lambda h, w: h.new_ones(h.shape[0], *h.shape[1:]) * h, lambda h, w: h.tril(),
]  # fmt: skip


@given(st.lists(st.sampled_from(STEPS), max_size=5), st.integers(2, 5))
@settings(max_examples=250)
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
