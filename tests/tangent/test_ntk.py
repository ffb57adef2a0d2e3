"""The streamed kernel: any batch size, any target, killed and continued."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_error
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


@given(
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(0, 6)),
    st.integers(1, 8),
    st.sampled_from(KINDS),
    st.sampled_from([1 << 32, 4000]),
)
@settings(max_examples=20, deadline=None)
def test_does_not_depend_on_batch_size(any_device, n, m, batch_size, outputs, memory_budget):
    x1, x2 = (None if size is None else examples(size, size).to(any_device) for size in (n, m))
    module = net().to(any_device)
    whole = jacpot.ntk(module, x1, x2, outputs=outputs)
    streamed = jacpot.ntk(
        module, x1, x2, outputs=outputs, batch_size=batch_size, memory_budget=memory_budget
    )
    assert streamed.shape == shape(n, n if m is None else m, outputs)
    streamed, whole = streamed.cpu(), whole.cpu()
    assert relative_error(streamed, whole) < 1e-12
    if m is None:
        mirrored = streamed.permute(2, 3, 0, 1) if outputs == "full" else streamed.transpose(0, 1)
        assert torch.equal(streamed, mirrored)


@pytest.mark.parametrize("outputs", KINDS)
def test_a_small_budget_makes_blocks(outputs):
    x = examples(9)
    small = jacpot.ntk(net(), x, outputs=outputs, memory_budget=5000)
    assert relative_error(small, jacpot.ntk(net(), x, outputs=outputs)) < 1e-12


@pytest.mark.parametrize("outputs", KINDS)
@pytest.mark.parametrize("kind", ["tensor", "array", "memmap", "path"])
def test_targets(kind, outputs, tmp_path):
    x, expected = examples(7), jacpot.ntk(net(), examples(7), outputs=outputs)
    size = shape(7, 7, outputs)
    out = {
        "tensor": lambda: torch.empty(size, dtype=torch.float64),
        "array": lambda: numpy.empty(size),
        "memmap": lambda: numpy.memmap(tmp_path / "k", "float64", "w+", shape=size),
        "path": lambda: tmp_path / "k.npy",
    }[kind]()
    found = jacpot.ntk(net(), x, outputs=outputs, batch_size=3, out=out)
    assert kind == "path" or found is out
    assert relative_error(torch.as_tensor(numpy.asarray(found)), expected) < 1e-12
    assert not list(tmp_path.glob("*journal*"))
    if kind == "path":
        stored = torch.from_numpy(numpy.load(out))
        assert relative_error(stored, expected) < 1e-12


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    out = zarr.open(str(tmp_path / "k.zarr"), mode="w", shape=(7, 7), chunks=(3, 3), dtype="f8")
    found = jacpot.ntk(net(), examples(7), outputs="trace", batch_size=3, out=out)
    expected = jacpot.ntk(net(), examples(7), outputs="trace")
    assert relative_error(torch.from_numpy(found[:]), expected) < 1e-12


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


def test_an_interrupted_computation_continues(tmp_path):
    module, x, path = Failing(), examples(8), tmp_path / "k.npy"
    x[7] = 9
    expected = jacpot.ntk(module, x, outputs="trace")
    module.fails = True
    with pytest.raises(OSError, match="went down"):
        jacpot.ntk(module, x, outputs="trace", batch_size=2, out=path)
    journal = tmp_path / "k.npy.jacpot-journal"
    assert [line.split()[:2] for line in journal.read_text().splitlines()[1:]] == [
        ["0", "0"], ["0", "1"], ["1", "1"], ["0", "2"], ["1", "2"], ["2", "2"],
    ]  # fmt: skip
    before = numpy.load(path, mmap_mode="r+")
    before[0, 0] = 123.0  # of a finished block: it must not be computed again
    module.fails = False
    found = jacpot.ntk(module, x, outputs="trace", batch_size=2, out=path)
    assert found[0, 0] == 123.0
    found[0, 0] = expected[0, 0]
    assert relative_error(torch.from_numpy(numpy.array(found)), expected) < 1e-12
    assert not journal.exists()


def test_a_journal_of_another_computation_is_refused(tmp_path):
    module, x, path = Failing(), examples(8), tmp_path / "k.npy"
    x[7], module.fails = 9, True
    with pytest.raises(OSError, match="went down"):
        jacpot.ntk(module, x, outputs="trace", batch_size=2, out=path)
    module.fails = False
    with pytest.raises(ValueError, match="another computation"):
        jacpot.ntk(module, examples(8, 5), outputs="trace", batch_size=2, out=path)
    with pytest.raises(ValueError, match="another computation"):
        jacpot.ntk(module, x, outputs="trace", batch_size=3, out=path)


def test_killed_halfway_it_continues(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys, torch, jacpot
        torch.manual_seed(0)
        net, x = torch.nn.Linear(4, 2), torch.randn(12, 4)
        class Killed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net
            def forward(self, x):
                if torch.isin(x[:, 0], last).any() and len(x) == 2 and sys.argv[2] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                return self.net(x)
        last = x[-1:, 0]
        from jacpot.tangent import journal
        journal.FLUSH_SECONDS = 0
        jacpot.ntk(Killed(), x, outputs="trace", batch_size=2, out=sys.argv[1])
    """)
    path = tmp_path / "k.npy"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(mode):
        command = [sys.executable, "-c", script, str(path), mode]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run("kill") == -signal.SIGKILL
    journal = tmp_path / "k.npy.jacpot-journal"
    assert len(journal.read_text().splitlines()) == 1 + 15
    assert run("live") == 0
    torch.manual_seed(0)
    module, x = nn.Linear(4, 2), torch.randn(12, 4)
    expected = jacpot.ntk(module, x, outputs="trace")
    assert relative_error(torch.from_numpy(numpy.load(path)), expected) < 1e-5


def test_factors_are_computed_once_where_memory_allows():
    module, x = Failing(), examples(8)
    jacpot.ntk(module, x, batch_size=8)
    once = module.calls  # the probe's and one
    module.calls = 0
    jacpot.ntk(module, x, batch_size=2)
    assert module.calls == once + 3


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


@pytest.mark.parametrize(("held", "expected"), [(1, 55), (2, 30), (3, 22), (5, 15), (10, 10)])
def test_factors_are_computed_once_for_each_band_of_blocks(monkeypatch, held, expected):
    """Of ten blocks as many are held as fit; those behind them pass by once for all of these."""
    module, x = net(), examples(40)
    one = jacpot.jacobian(module, x[:1]).nbytes
    budget = held * 4 * one * 8 // 5 + 8  # five eighths are for what is held
    kernel, blocks = captured(
        monkeypatch, module, x, outputs="trace", batch_size=4, memory_budget=budget
    )
    assert relative_error(kernel, jacpot.jacobian(module, x).gram(outputs="trace")) < 1e-12
    assert blocks == expected


def test_factors_of_two_sides_are_computed_once_for_each_band(monkeypatch):
    module, x, other = net(), examples(12), examples(8, 2)
    one = jacpot.jacobian(module, x[:1]).nbytes
    options = {"outputs": "trace", "batch_size": 2, "memory_budget": 3 * 2 * one * 8 // 5 + 8}
    kernel, blocks = captured(monkeypatch, module, x, other, **options)
    expected = jacpot.jacobian(module, x).gram(jacpot.jacobian(module, other), outputs="trace")
    assert relative_error(kernel, expected) < 1e-12
    assert blocks == 6 + 2 * 4


def test_what_is_finished_is_not_captured_again(monkeypatch, tmp_path):
    module, x, path = Failing(), examples(8), tmp_path / "k.npy"
    x[7], module.fails = 9, True
    with pytest.raises(OSError, match="went down"):
        jacpot.ntk(module, x, outputs="trace", batch_size=2, out=path)
    module.fails = False
    _, blocks = captured(monkeypatch, module, x, outputs="trace", batch_size=2, out=path)
    assert blocks == 4  # the last column's, and what it meets


def test_progress_is_shown(capsys):
    jacpot.ntk(net(), examples(5), batch_size=2, progress=True)
    assert "100%" in capsys.readouterr().out


def test_refuses():
    x = examples(4)
    with pytest.raises(ValueError, match=r"'out'.*\(4, 4\).*\(3, 3\)"):
        jacpot.ntk(net(), x, outputs="trace", out=numpy.empty((3, 3)))
    with pytest.raises(TypeError, match=r"'out'.*float64.*float32"):
        jacpot.ntk(net(), x, outputs="trace", out=torch.empty(4, 4))
    with pytest.raises(TypeError, match=r"'out'.*int"):
        jacpot.ntk(net(), x, outputs="trace", out=3)
    with pytest.raises(ValueError, match="'batch_size'"):
        jacpot.ntk(net(), x, batch_size=0)
    with pytest.raises(ValueError, match="'outputs'"):
        jacpot.ntk(net(), x, outputs="all")
