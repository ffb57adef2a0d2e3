"""Whole networks, of few channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.first, self.second = conv_bn(i, o, stride), conv_bn(o, o)
        self.down = nn.Identity()
        if stride != 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.second(self.relu(self.first(x)))
        h += self.down(x)
        return self.relu(h)


def resnet(widths, depth, classes=3):
    layers = [conv_bn(3, widths[0]), nn.ReLU(inplace=True)]
    i = widths[0]
    for stage, o in enumerate(widths):
        for block in range(depth):
            layers.append(Residual(i, o, 2 if stage and not block else 1))
            i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, classes))


def resnet18():
    return resnet([2, 3, 4, 5], 2)


def resnet20():
    return resnet([2, 3, 4], 3)


def vgg11_bn():
    layers, i = [], 3
    for o in (2, "M", 3, "M", 4, 4, "M", 5, 5, "M", 5, 5, "M"):
        if o == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
            i = o
    head = [nn.Linear(5, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 6), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Dropout(), nn.Linear(6, 3))


def lenet5():
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))


class Encoder(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.scale * self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width=6, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*[Encoder(width, 2) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Causal(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Gives next-token scores at the last position; embeddings are tied to the head."""

    def __init__(self, vocabulary=9, width=6, length=5):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Causal(width, 2), Causal(width, 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        return self.head(self.norm(self.blocks(x)))[:, -1]


IMAGES = (3, 32, 32)
NETWORKS = {
    "mlp": (mlp, (5,)),
    "lenet5": (lenet5, (1, 16, 16)),
    "vgg11_bn": (vgg11_bn, IMAGES),
    "resnet18": (resnet18, (3, 16, 16)),
    "resnet20": (resnet20, (3, 12, 12)),
    "vit": (ViT, (3, 8, 8)),
    "gpt": (GPT, None),
}


def build(name, n=3, dtype=torch.float64):
    """Give the network, in eval mode with lively buffers, and ``n`` examples."""
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    net = make().to(dtype).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    x = torch.randint(0, 9, (n, 5)) if shape is None else torch.randn(n, *shape, dtype=dtype)
    return net, x
