"""Networks of images, a few units wide."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from architecture_parts import Net, architecture, images, parameter
from torch import nn


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
