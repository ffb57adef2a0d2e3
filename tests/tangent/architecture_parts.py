"""What networks as people write them are made of in tests, and the list of them."""

from __future__ import annotations

import torch
from torch import nn

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
