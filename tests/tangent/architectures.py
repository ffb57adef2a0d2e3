"""Networks as people write them, a few units wide: what they are made of, not what they learn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

ARCHITECTURES = {}


def architecture(make):
    ARCHITECTURES[make.__name__] = make
    return make


class Net(nn.Module):
    """Modules, parameters and buffers by name, and a function of them and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                delattr(self, name)
                self.register_buffer(name, part)

    def forward(self, *x, **named):
        return self.function(self, *x, **named)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def images(n=3, channels=3, size=8):
    return torch.randn(n, channels, size, size)


def tokens(n=3, length=5, vocabulary=9):
    return torch.randint(0, vocabulary, (n, length))


@architecture
def mobile_net():
    def block(net, x):
        return x + net.inner(x)

    def inverted(c):
        conv = nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU6(inplace=True)
        depth = nn.Conv2d(2 * c, 2 * c, 3, 1, 1, groups=2 * c), nn.ReLU6(inplace=True)
        return Net(block, inner=nn.Sequential(*conv, *depth, nn.Conv2d(2 * c, c, 1)))

    stem = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3)
    return nn.Sequential(*stem, inverted(4), *head), images()


@architecture
def efficient_net():
    def excited(net, x):
        b, c, _, _ = x.size()
        y = x.mean((2, 3)).view(b, c)
        y = torch.sigmoid(net.up(F.silu(net.down(y)))).view(b, c, 1, 1)
        return x * y.expand_as(x)

    squeeze = Net(excited, down=nn.Linear(4, 2), up=nn.Linear(2, 4))
    stem = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU(inplace=True)
    return nn.Sequential(*stem, squeeze, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)), images()


@architecture
def conv_next():
    def block(net, x):
        h = net.depth(x).permute(0, 2, 3, 1)
        h = net.gamma * net.down(F.gelu(net.up(net.norm(h))))
        return x + h.permute(0, 3, 1, 2)

    def channels_first(net, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return net.weight[:, None, None] * x + net.bias[:, None, None]

    body = Net(
        block, depth=nn.Conv2d(4, 4, 3, padding=1, groups=4), norm=nn.LayerNorm(4),
        up=nn.Linear(4, 8), down=nn.Linear(8, 4), gamma=parameter(4),
    )  # fmt: skip
    norm = Net(channels_first, weight=parameter(4), bias=parameter(4))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), norm, body, *head), images()


@architecture
def u_net():
    def forward(net, x):
        a = F.relu(net.first(x))
        up = net.up(F.relu(net.second(F.max_pool2d(a, 2))))
        y = net.out(torch.cat([a, up], dim=1))
        return y + F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="bilinear")

    return Net(
        forward, first=nn.Conv2d(1, 2, 3, padding=1), second=nn.Conv2d(2, 3, 3, padding=1),
        up=nn.ConvTranspose2d(3, 2, 2, 2), out=nn.Conv2d(4, 1, 1),
    ), images(3, 1, 4)  # fmt: skip


@architecture
def dense_net():
    def forward(net, x):
        features = [x.clone()]
        for layer in net.layers:
            features.append(layer(torch.cat(features, 1)))
        return net.head(torch.cat(features, 1).mean([2, 3]))

    def layer(c):
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 2, 3, 1, 1))

    return Net(forward, layers=nn.ModuleList([layer(3), layer(5)]), head=nn.Linear(7, 3)), images()


@architecture
def inception():
    def forward(net, x):
        branches = [net.one(x), net.three(x), F.max_pool2d(x, 3, 1, 1)]
        return net.head(F.adaptive_avg_pool2d(torch.cat(branches, 1), 1).squeeze(-1).squeeze(-1))

    one, three = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)
    return Net(forward, one=one, three=three, head=nn.Linear(7, 3)), images()


@architecture
def mixer():
    def forward(net, x):
        h = net.patches(x).flatten(2).transpose(1, 2)
        h = h + net.over_patches(h.transpose(1, 2)).transpose(1, 2)
        return net.head(net.norm(h).mean(dim=1))

    over = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
    patches, norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
    return Net(
        forward, patches=patches, over_patches=over, norm=norm, head=nn.Linear(6, 2)
    ), images()


@architecture
def perceiver():
    def heads(x):
        return x.reshape(x.shape[0], -1, 2, 3).transpose(1, 2)

    def forward(net, x):
        latents = net.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        q, (k, v) = net.q(net.norm(latents)), net.kv(x).chunk(2, dim=-1)
        scores = heads(q) @ heads(k).transpose(-2, -1) / math.sqrt(3)
        h = (scores.softmax(-1) @ heads(v)).transpose(1, 2).reshape(x.shape[0], -1, 6)
        return net.out(latents + h).mean(1)

    return Net(
        forward, latents=parameter(3, 6), norm=nn.LayerNorm(6), q=nn.Linear(6, 6),
        kv=nn.Linear(4, 12), out=nn.Linear(6, 2),
    ), torch.randn(3, 5, 4)  # fmt: skip


@architecture
def lstm_language_model():
    def forward(net, x):
        return net.head(net.rnn(net.embedding(x))[0])

    rnn = nn.LSTM(4, 5, 2, batch_first=True)
    return Net(forward, embedding=nn.Embedding(9, 4), rnn=rnn, head=nn.Linear(5, 9)), tokens(2, 3)


@architecture
def gru_with_time_first():
    def forward(net, x):
        outputs, h = net.rnn(x.transpose(0, 1))
        return net.head(torch.cat([h[0], h[1]], -1)) + net.head(outputs.mean(0))

    rnn = nn.GRU(4, 3, bidirectional=True)
    return Net(forward, rnn=rnn, head=nn.Linear(6, 2)), torch.randn(3, 4, 4)


@architecture
def graph_convolution():
    def forward(net, x, adjacency):
        return torch.bmm(adjacency, F.relu(adjacency @ net.first(x)) @ net.second).mean(1)

    inputs = torch.randn(3, 5, 4), torch.rand(3, 5, 5)
    return Net(forward, first=nn.Linear(4, 6), second=parameter(6, 2)), inputs


@architecture
def transformer_encoder():
    def forward(net, x):
        return net.head(net.encoder(x, mask=net.mask)).flatten(1)

    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    return Net(forward, encoder=encoder, head=nn.Linear(6, 2), mask=mask), torch.randn(3, 4, 6)


@architecture
def transformer_with_time_first():
    def forward(net, x):
        return net.head(net.encoder(x.transpose(0, 1))[0])

    layer = nn.TransformerEncoderLayer(6, 2, 8)
    return Net(forward, encoder=layer, head=nn.Linear(6, 2)), torch.randn(3, 4, 6)


@architecture
def transformer_with_padding():
    def forward(net, x):
        padding = x == 0
        h = net.encoder(net.embedding(x), src_key_padding_mask=padding)
        h = h.masked_fill(padding[..., None], 0.0)
        return net.head(h.sum(1) / (~padding).sum(1, keepdim=True))

    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    x = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [1, 2, 3, 4]])
    embedding = nn.Embedding(9, 6, padding_idx=0)
    return Net(forward, encoder=layer, embedding=embedding, head=nn.Linear(6, 2)), x


@architecture
def encoder_and_decoder():
    def forward(net, source, target):
        return net.head(net.transformer(source, target)).flatten(1)

    transformer = nn.Transformer(6, 2, 1, 1, 8, batch_first=True)
    inputs = torch.randn(3, 3, 6), torch.randn(3, 2, 6)
    return Net(forward, transformer=transformer, head=nn.Linear(6, 2)), inputs


@architecture
def llama():
    """Rotary embeddings, root-mean-square norms, a gated MLP and tied embeddings."""

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def forward(net, ids):
        x = net.tokens(ids)
        n, t, c = x.shape
        angles = torch.outer(torch.arange(t, device=x.device).to(x.dtype), net.frequencies)
        cos, sin = (f(torch.cat((angles, angles), -1))[None, None] for f in (torch.cos, torch.sin))
        q, k, v = (layer(net.norm(x)).view(n, t, 2, -1).transpose(1, 2) for layer in net.qkv)
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + net.out(h.transpose(1, 2).contiguous().view(n, t, c))
        x = x + net.down(F.silu(net.gate(x)) * net.up(x))
        return F.linear(x, net.tokens.weight)[:, -1, :]

    def linear(i, o):
        return nn.Linear(i, o, bias=False)

    return Net(
        forward, tokens=nn.Embedding(9, 8), norm=nn.RMSNorm(8), out=linear(8, 8), up=linear(8, 6),
        qkv=nn.ModuleList([linear(8, 8) for _ in range(3)]), gate=linear(8, 6), down=linear(6, 8),
        frequencies=torch.tensor([1.0, 0.1]),
    ), tokens()  # fmt: skip


@architecture
def nano_gpt():
    def forward(net, ids):
        b, t = ids.size()
        x = net.tokens(ids) + net.places(torch.arange(0, t, dtype=torch.long))
        q, k, v = (p.view(b, t, 2, 3).transpose(1, 2) for p in net.qkv(x).split(6, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(net.past[:, :, :t, :t] == 0, float("-inf"))
        h = (net.drop(F.softmax(scores, dim=-1)) @ v).transpose(1, 2).contiguous().view(b, t, 6)
        return net.head((x + h)[:, [-1], :])

    return Net(
        forward, tokens=nn.Embedding(9, 6), places=nn.Embedding(6, 6), qkv=nn.Linear(6, 18),
        head=nn.Linear(6, 9), drop=nn.Dropout(0.1), past=torch.ones(1, 1, 6, 6).tril(),
    ), tokens()  # fmt: skip


@architecture
def positions_of_each_example():
    def forward(net, ids):
        places = torch.arange(ids.size(1)).unsqueeze(0).expand(ids.size(0), -1)
        return net.head(net.tokens(ids) + net.places(places)).mean(1)

    parts = {"tokens": nn.Embedding(9, 6), "places": nn.Embedding(6, 6), "head": nn.Linear(6, 2)}
    return Net(forward, **parts), tokens()


@architecture
def shifted_windows():
    """Swin: windows join the batch, and every one adds the same bias that it looks up."""

    def forward(net, x):
        x = torch.roll(net.patches(x).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        b, h, w, c = x.shape
        win = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = net.qkv(win).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        bias = net.table[net.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2)
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return net.head((x + y).flatten(1, 2).mean(1))

    return Net(
        forward, patches=nn.Conv2d(3, 4, 2, 2), qkv=nn.Linear(4, 12), table=parameter(9, 2),
        head=nn.Linear(4, 2), index=torch.randint(0, 9, (4, 4)),
    ), images()  # fmt: skip


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


def build(name):
    """Give the network in eval mode, in float64, and its examples."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        net, x = ARCHITECTURES[name]()
    finally:
        torch.set_default_dtype(dtype)
    return net.eval(), x
