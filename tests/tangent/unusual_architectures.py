"""Networks that compute their weights, choose their course or take derivatives themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from architecture_parts import Net, architecture, images, parameter
from torch import nn
from torch.nn.utils import parametrizations


@architecture
def weight_normalised():
    conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    linear = parametrizations.spectral_norm(nn.Linear(16, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), linear), images()


@architecture
def low_rank_adaptation():
    def forward(net, x):
        h = net.base(x) + x @ net.down.T @ net.up.T * 0.5
        return F.linear(h.tanh(), net.down[:, :3].T @ net.up.T)

    base = nn.Linear(4, 6)
    base.bias.requires_grad_(False)
    return Net(forward, base=base, down=parameter(2, 4), up=parameter(6, 2)), torch.randn(3, 4)


@architecture
def several_inputs_and_slopes():
    def forward(net, a, b):
        return net.head(net.slopes(net.both(a, b)))

    slopes, inputs = nn.PReLU(5), (torch.randn(3, 3), torch.randn(3, 4))
    return Net(forward, both=nn.Bilinear(3, 4, 5), slopes=slopes, head=nn.Linear(5, 2)), inputs


@architecture
def parameters_outside_their_module():
    def forward(net, x):
        h = net.layer(net.slopes(net.layer(x)))
        return (
            F.linear(h, net.layer.weight.t())
            + net.layer.weight.sum()
            + net.layer.bias.dot(net.layer.bias)
        )

    return Net(forward, layer=nn.Linear(4, 4), slopes=nn.PReLU(4)), torch.randn(3, 4)


@architecture
def heads_by_einsum():
    def forward(net, x):
        q = torch.einsum("btd,hde->bhte", x, net.enter)
        return torch.einsum("bhte,hed->btd", q.tanh(), net.leave).sum(1)

    return Net(forward, enter=parameter(2, 4, 3), leave=parameter(2, 3, 4)), torch.randn(3, 3, 4)


@architecture
def mixture_of_experts():
    def forward(net, x):
        y = torch.baddbmm(net.bias, x.unsqueeze(0).expand(3, -1, -1), net.weight)
        return torch.einsum("enk,ne->nk", y, net.gate(x).softmax(-1))

    return Net(
        forward, weight=parameter(3, 4, 2), bias=parameter(3, 1, 2), gate=nn.Linear(4, 3)
    ), torch.randn(3, 4)


@architecture
def experts_by_choice():
    """Code that looks at values: one example at a time."""

    def forward(net, x):
        weight, choice = net.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 2)
        for i, expert in enumerate(net.experts):
            chosen = choice == i
            if chosen.any():
                out[chosen] = weight[chosen].unsqueeze(-1) * expert(x[chosen])
        return out

    experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
    return Net(forward, gate=nn.Linear(4, 3), experts=experts), torch.randn(3, 4)


@architecture
def prototypes():
    """A function that nobody knows, of which torch.func.vmap gives wrong derivatives."""

    def forward(net, x):
        return -torch.cdist(net.layer(x), net.prototypes) * net.scale.exp()

    return Net(
        forward, layer=nn.Linear(4, 6), prototypes=parameter(3, 6), scale=parameter()
    ), torch.randn(3, 4)


@architecture
def fourier_operator():
    def forward(net, x):
        waves = torch.fft.rfft(x, dim=1)[:, :3]
        weight = torch.complex(net.real, net.imaginary)
        y = torch.fft.irfft(torch.einsum("nmi,iom->nmo", waves, weight), n=x.shape[1], dim=1)
        return net.head(y).flatten(1)

    parts = {"real": parameter(2, 2, 3), "imaginary": parameter(2, 2, 3), "head": nn.Linear(2, 1)}
    return Net(forward, **parts), torch.randn(3, 6, 2)


@architecture
def neural_ode():
    def forward(net, x):
        for _ in range(3):
            x = x + net.step * net.field(x)
        return x

    field = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return Net(forward, field=field, step=parameter()), torch.randn(3, 3)


@architecture
def normalising_flow():
    def forward(net, x):
        a, b = (x @ net.weight).split(2, dim=1)
        log_scale, shift = net.coupling(a).chunk(2, 1)
        y = torch.cat([a, b * log_scale.exp() + shift], 1)
        volume = log_scale.sum(-1) + torch.linalg.slogdet(net.weight)[1]
        return (volume - (y**2).sum(-1) / 2).unsqueeze(-1)

    return Net(forward, weight=parameter(4, 4), coupling=nn.Linear(2, 4)), torch.randn(3, 4)


@architecture
def hamiltonian():
    """A network that takes derivatives of its own layers."""

    def forward(net, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(net.layer(x).tanh().sum(), x, create_graph=True)[0]

    return Net(forward, layer=nn.Linear(4, 3)), torch.randn(3, 4)


@architecture
def gradient_by_torch_func():
    def forward(net, x):
        return torch.func.vmap(torch.func.grad(lambda z: net.layer(z).tanh().sum()))(x)

    return Net(forward, layer=nn.Linear(4, 3)), torch.randn(3, 4)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x * w).sum(0)


@architecture
def function_of_its_own():
    def forward(net, x):
        return net.head(Squared.apply(net.layer(x), net.scale))

    return Net(
        forward, layer=nn.Linear(4, 5), scale=parameter(5), head=nn.Linear(5, 2)
    ), torch.randn(3, 4)


@architecture
def compiled():
    layer = nn.Linear(4, 5)
    layer.compile(backend="eager")
    return torch.compile(nn.Sequential(layer, nn.Linear(5, 2)), backend="eager"), torch.randn(3, 4)


@architecture
def traced_inside():
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), torch.randn(2, 4))
    return nn.Sequential(traced, nn.Linear(5, 2)), torch.randn(3, 4)
