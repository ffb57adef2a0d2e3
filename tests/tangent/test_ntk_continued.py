"""A streamed kernel that was stopped: continued if it is the same, else refused or begun anew."""

import os
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from oracle import relative_error
from streams import KINDS, Ending, Failing, captured, examples, net, shape

import jacpot


def kernel(module, x, out, **options):
    return jacpot.ntk(module, x, out=out, **{"outputs": "trace", "batch_size": 2, **options})


def stopped(out, **options):
    """Compute all but the last column of blocks; give the network and the examples."""
    module, x = Failing(), examples(8)
    x[7], module.fails = 9, True
    with pytest.raises(OSError, match="went down"):
        kernel(module, x, out, **options)
    module.fails = False
    return module, x


def finished(journal):
    return [tuple(map(int, line.split()[:2])) for line in journal.read_text().splitlines()[1:]]


@pytest.mark.parametrize("outputs", KINDS)
def test_it_continues_from_the_blocks_that_are_finished(outputs, tmp_path, monkeypatch):
    path, journal = tmp_path / "k.npy", tmp_path / "k.npy.jacpot-journal"
    module, x = stopped(path, outputs=outputs)
    assert finished(journal) == [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    options = {"outputs": outputs, "batch_size": 2, "out": path}
    found, blocks = captured(monkeypatch, module, x, **options)
    assert blocks == 4  # the last column's, and what it meets
    assert relative_error(torch.from_numpy(found), jacpot.ntk(module, x, outputs=outputs)) < 1e-12
    assert not journal.exists()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_process_that_ends_halfway_is_continued(how, tmp_path):
    path, journal = tmp_path / "k.npy", tmp_path / "k.npy.jacpot-journal"
    script = f"""
import signal, sys, jacpot
from jacpot.tangent import journal
from streams import Ending, examples
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
if {how!r} == "SIGKILL":
    journal.FLUSH_SECONDS = 0  # nothing is recorded on the way out
x = examples(8)
x[7] = 9
jacpot.ntk(Ending({how!r}), x, outputs="trace", batch_size=2, out=sys.argv[1])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == -getattr(signal, how), ended.stderr
    assert len(finished(journal)) == 6
    x = examples(8)
    x[7] = 9
    found = kernel(Ending(), x, path)
    assert relative_error(torch.from_numpy(found), jacpot.ntk(net(), x, outputs="trace")) < 1e-12


def turned(module):
    module.inner[1] = torch.nn.Softsign()


def shifted(module):
    module.inner[4].running_mean.add_(1)


def frozen(module):
    module.inner[0].requires_grad_(False)


def moved(module):
    with torch.no_grad():
        module.inner[0].weight.add_(1)


@pytest.mark.parametrize("change", [turned, shifted, frozen, moved])
def test_another_network_is_refused(change, tmp_path):
    module, x = stopped(tmp_path / "k.npy")
    change(module)
    with pytest.raises(ValueError, match=r"'out' holds part of another computation.*remove"):
        kernel(module, x, tmp_path / "k.npy")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3},
        {"x2": examples(8)},
        {"output": lambda y: 2 * y},
        {"mask": {"inner.0.weight": torch.rand(3, 2, 2) < 0.5}},
        {"wrt": "all"},
        {"precision": "tf32"},
    ],
)
def test_another_computation_is_refused(options, tmp_path):
    module, x = stopped(tmp_path / "k.npy")
    with pytest.raises(ValueError, match="another computation"):
        kernel(module, x, tmp_path / "k.npy", **options)
    with pytest.raises(ValueError, match="another computation"):
        kernel(module, examples(8, 5), tmp_path / "k.npy")


def torn(journal):  # as if the process had been killed while it wrote
    journal.write_text(journal.read_text() + "1")


def garbled(journal):
    journal.write_bytes(journal.read_bytes() + b"x y .\n\xff\xfe\n-1 99 00000000 .\n")


def begun(journal):
    journal.write_text(journal.read_text()[:20])


def emptied(journal):
    journal.write_text("")


@pytest.mark.parametrize("damage", [torn, garbled, begun, emptied])
def test_a_damaged_journal(damage, tmp_path):
    path, journal = tmp_path / "k.npy", tmp_path / "k.npy.jacpot-journal"
    module, x = stopped(path)
    known = finished(journal)
    damage(journal)
    module.fails = True
    with pytest.raises(OSError, match="went down"):
        kernel(module, x, path)
    # what is appended to a torn line must not become another block's name
    lines = journal.read_text(errors="replace").splitlines()[1:]
    named = [line.split()[:2] for line in lines if re.fullmatch(r"\d+ \d+ \w{8} \.", line)]
    assert [tuple(map(int, pair)) for pair in named] == known
    module.fails = False
    found = kernel(module, x, path)
    assert relative_error(torch.from_numpy(found), jacpot.ntk(module, x, outputs="trace")) < 1e-12


def removed(path):
    path.unlink()


def made_anew(path):
    numpy.lib.format.open_memmap(path, "w+", dtype="float64", shape=(8, 8))


def written_to(path):
    numpy.load(path, mmap_mode="r+")[0, 2] = 123.0


def written_to_where_it_is_mirrored(path):
    numpy.load(path, mmap_mode="r+")[2, 0] = 123.0


@pytest.mark.parametrize(
    "change", [removed, made_anew, written_to, written_to_where_it_is_mirrored]
)
def test_an_output_that_lost_its_blocks(change, tmp_path):
    path = tmp_path / "k.npy"
    module, x = stopped(path)
    change(path)
    found = kernel(module, x, path)
    assert relative_error(torch.from_numpy(found), jacpot.ntk(module, x, outputs="trace")) < 1e-12


class Chunked:
    """Has what a zarr array has, and room for so many elements more."""

    def __init__(self, path, size, root="root", room=1000):
        self.array = numpy.lib.format.open_memmap(path, "w+", dtype="float64", shape=size)
        self.shape, self.dtype, self.room = self.array.shape, self.array.dtype, room
        self.store, self.path = SimpleNamespace(**{root: str(path)}), "kernels/first"

    def __getitem__(self, index):
        return numpy.array(self.array[index])

    def __setitem__(self, index, values):
        assert type(values) is numpy.ndarray
        assert all(type(part) is slice for part in index)
        self.room -= values.size
        if self.room < 0:
            raise OSError("no space left on the device")
        self.array[index] = values


@pytest.mark.parametrize("outputs", KINDS)
@pytest.mark.parametrize("root", ["root", "path"])  # a store of zarr 3, of zarr 2
def test_a_full_disk_is_continued(outputs, root, tmp_path, monkeypatch):
    size = shape(8, 8, outputs)
    out = Chunked(tmp_path / "k", size, root, room=numpy.prod(size) // 2)
    module, x = net(), examples(8)
    with pytest.raises(OSError, match="no space"):
        kernel(module, x, out, outputs=outputs)
    journal = tmp_path / "k-kernels-first.jacpot-journal"
    assert finished(journal)
    out.room = 1000
    options = {"outputs": outputs, "batch_size": 2, "out": out}
    found, blocks = captured(monkeypatch, module, x, **options)
    assert found is out
    assert blocks <= 4
    expected = jacpot.ntk(module, x, outputs=outputs)
    assert relative_error(torch.from_numpy(out[:]), expected) < 1e-12
    assert not journal.exists()


def test_a_file_for_which_there_is_no_room_is_not_begun(tmp_path):
    path, x = tmp_path / "k.npy", examples(200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            jacpot.ntk(net(), x, outputs="trace", batch_size=100, out=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    found = jacpot.ntk(net(), x, outputs="trace", batch_size=100, out=path)
    assert relative_error(torch.from_numpy(found), jacpot.ntk(net(), x, outputs="trace")) < 1e-12


def test_no_examples_are_a_file_too(tmp_path):
    assert jacpot.ntk(net(), examples(0), outputs="trace", out=tmp_path / "k.npy").shape == (0, 0)


def test_refuses_files_that_are_no_arrays(tmp_path):
    x, wrong = examples(4), tmp_path / "k.npy"
    with pytest.raises(ValueError, match=r"'out' must be the path of a \.npy file, got '.*kernel'"):
        kernel(net(), x, tmp_path / "kernel")
    wrong.write_text("hello")
    with pytest.raises(ValueError, match=r"'out' must be the path of a \.npy file, got '.*EOF"):
        kernel(net(), x, wrong)
    numpy.save(wrong, numpy.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"'out' must have shape \(4, 4\), got \(3, 3\)"):
        kernel(net(), x, wrong)
    numpy.save(wrong, numpy.zeros((4, 4), "float32"))
    with pytest.raises(TypeError, match="'out' must be float64, got float32"):
        kernel(net(), x, wrong)


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    path = str(tmp_path / "k.zarr")
    module, x = stopped(zarr.open(path, mode="w", shape=(8, 8), chunks=(3, 3), dtype="f8"))
    assert len(finished(tmp_path / "k.zarr.jacpot-journal")) == 6
    found = kernel(module, x, zarr.open(path, mode="r+"))
    expected = jacpot.ntk(module, x, outputs="trace")
    assert relative_error(torch.from_numpy(found[:]), expected) < 1e-12
