"""Networks and examples of streamed kernels."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

import jacpot
from jacpot.tangent.jacobian import JacobianSource


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)
    ).double().eval()  # fmt: skip


def examples(n, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 2, 5, dtype=torch.float64)


KINDS = ("full", "trace", "diagonal")


def shape(n, m, outputs):
    return {"full": (n, 3, m, 3), "trace": (n, m), "diagonal": (n, m, 3)}[outputs]


class Failing(nn.Module):
    """Fails on the examples of the last batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.fails, self.calls = net(), False, 0

    def forward(self, x):
        self.calls += 1
        if self.fails and (x == 9).any():
            raise OSError("the machine went down")
        return self.inner(x)


class Ending(nn.Module):
    """Ends the process, as from outside, on the last examples of a block of two."""

    def __init__(self, how=None):
        super().__init__()
        self.inner, self.how = net(), how

    def forward(self, x):
        if (x == 9).any() and len(x) == 2 and self.how is not None:
            os.kill(os.getpid(), getattr(signal, self.how))
        return self.inner(x)


def captured(monkeypatch, *arguments, **options):
    """Give the kernel, and how many blocks of factors were computed for it."""
    blocks = []
    take = JacobianSource.__call__

    def count(source, x, examples=None, targets=None):
        if examples is None or examples != slice(1):  # which is how memory is measured
            blocks.append(examples)
        return take(source, x, examples, targets)

    monkeypatch.setattr(JacobianSource, "__call__", count)
    return jacpot.ntk(*arguments, **options), len(blocks)
