"""Rows of parts of the examples that are put where those of all examples go."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import jacpot
from jacpot.tangent.room import Room, in_a_row

LIKE = torch.zeros((), dtype=torch.float64)


def test_parts_lie_in_a_row():
    room, parts = Room(5), []
    for begin, size in ((0, 2), (2, 2), (4, 1)):
        room.begin(begin)
        parts.append(room("weight", (size, 3, 4), LIKE).fill_(begin))
    joined = in_a_row(parts)
    assert joined.data_ptr() == parts[0].data_ptr()
    assert torch.equal(joined, torch.cat(parts))


def test_what_does_not_fit_gets_memory_of_its_own():
    room = Room(4)
    first = room("weight", (2, 3), LIKE)
    again = room("weight", (2, 3), LIKE)
    room.begin(2)
    wider, more = room("weight", (2, 4), LIKE), room("weight", (3, 3), LIKE)
    starts = {x.untyped_storage().data_ptr() for x in (first, again, wider, more)}
    assert len(starts) == 4
    assert in_a_row([first, room("weight", (2, 3), LIKE)]) is not None
    assert in_a_row([first, again]) is None


def test_other_orders_are_not_in_a_row():
    x = torch.arange(12.0).view(6, 2)
    assert in_a_row([x[2:4], x[:2]]) is None
    assert in_a_row([x[:2], x[3:]]) is None
    assert in_a_row([x[:2, :1], x[2:, :1]]) is None
    assert torch.equal(in_a_row([x[:2], x[2:3], x[3:]]), x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.first(x))
        y = self.again(torch.relu(self.again(y)))
        return self.last(y.relu().mean((2, 3)))


@pytest.mark.parametrize("budget", [1, 200_000, 1 << 30])
def test_the_result_does_not_depend_on_the_parts(budget, monkeypatch):
    capture = importlib.import_module("jacpot.tangent.capture")
    monkeypatch.setattr(capture, "PART_EXAMPLES", 2)
    monkeypatch.setattr(capture, "PART_BYTES", 1)
    torch.manual_seed(0)
    net, x = Tied().double(), torch.randn(7, 2, 12, 12, dtype=torch.float64)
    found = jacpot.jacobian(net, x, memory_budget=budget).dense()
    expected = torch.cat([jacpot.jacobian(net, x[i : i + 1]).dense() for i in range(7)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Scaled(nn.Module):
    """A parameter that no rule covers, of large signals."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64, 1, 1))

    def forward(self, x):
        return x * self.scale


def of_this_process(field):
    """A field of this process' memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


@pytest.mark.filterwarnings("ignore:Scaled")
def test_the_memory_of_parts_does_not_add_up():
    """Not even in holes between the few numbers that are kept of each."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("the system does not count this process' memory anew")
    layers = nn.Conv2d(3, 64, 3, padding=1), Scaled(), nn.Tanh(), nn.AdaptiveAvgPool2d(1)
    net, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)), torch.randn(96, 3, 32, 32)
    jacpot.jacobian(net, x[:2], memory_budget=1 << 24)
    peak.write_text("5")
    before = of_this_process("VmRSS")
    J = jacpot.jacobian(net, x, memory_budget=1 << 24)
    assert J.nbytes < 8 << 20
    assert of_this_process("VmHWM") - before < 48  # all parts together take more than 500
