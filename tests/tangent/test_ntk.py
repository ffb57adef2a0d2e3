"""The streamed kernel: any batch size, any target."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_error
from streams import KINDS, Failing, captured, examples, net, shape

import jacpot


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


def test_factors_are_computed_once_where_memory_allows():
    module, x = Failing(), examples(8)
    jacpot.ntk(module, x, batch_size=8)
    once = module.calls  # the probe's and one
    module.calls = 0
    jacpot.ntk(module, x, batch_size=2)
    assert module.calls == once + 3


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
    with pytest.raises(ValueError, match="'batch_size' must be at least 1, got 0"):
        jacpot.ntk(net(), x, batch_size=0)
    with pytest.raises(TypeError, match="'batch_size' must be an int, got float"):
        jacpot.ntk(net(), x, batch_size=2.0)
    with pytest.raises(TypeError, match="'memory_budget' must be an int, got float"):
        jacpot.ntk(net(), x, memory_budget=1e9)
    with pytest.raises(TypeError, match="'memory_budget' must be an int, got str"):
        jacpot.jacobian(net(), x, memory_budget="1 GB")
    with pytest.raises(TypeError, match=r"'module' must be a torch\.nn\.Module, got str"):
        jacpot.ntk("net", x)
    with pytest.raises(ValueError, match="'out' must be writeable, got a read-only array"):
        jacpot.ntk(net(), x, outputs="trace", out=numpy.broadcast_to(numpy.zeros(4), (4, 4)))
    for out in (torch.zeros(4, 4).double().requires_grad_(), torch.zeros(4, 4).double().to("meta")):
        with pytest.raises(ValueError, match="'out' must be a tensor to write to"):
            jacpot.ntk(net(), x, outputs="trace", out=out)
    with pytest.raises(ValueError, match="'outputs'"):
        jacpot.ntk(net(), x, outputs="all")
