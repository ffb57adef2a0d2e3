"""What the tests of the layer rules build their networks of."""

import torch
from torch import nn


class Of(nn.Module):
    """A network written as a function of its layers and parameters and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tokens(*shape):
    return torch.randint(0, 7, shape)


def linear(i=6, o=6, **options):
    return nn.Linear(i, o, **options)
