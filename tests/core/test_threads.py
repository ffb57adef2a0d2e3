"""Kernels follow PyTorch's thread count, release the GIL and survive a fork."""

from __future__ import annotations

import os
import threading
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import jacpot

torch.manual_seed(0)
MASK = torch.rand(192, 160) < 0.2
PATTERN = jacpot.Pattern(MASK)
WEIGHT = torch.randn(192, 160, dtype=torch.float64) * MASK
X = torch.randn(300, 160, dtype=torch.float64)


def product() -> torch.Tensor:
    return jacpot.masked_matmul(X, PATTERN.compress(WEIGHT), PATTERN)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_any_thread_count_gives_the_same_product(restore_threads):
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        torch.testing.assert_close(product(), X @ WEIGHT.T, rtol=1e-13, atol=1e-13)


def test_many_python_threads_call_kernels_at_once():
    expected, results = product(), []
    callers = [threading.Thread(target=lambda: results.append(product())) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


def test_a_forked_child_runs_kernels_on_several_threads():
    """OpenMP's workers do not exist in the child; a kernel that waited for them would hang."""
    expected = product()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the point
        child = os.fork()
    if child == 0:
        std_threads = jacpot.build_info()["thread_runtime"] == "std::thread"
        same = bool((product().numpy() == expected.numpy()).all())
        os.write(writer, b"1" if same and std_threads else b"0")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"1"
    assert os.waitpid(child, 0)[1] == 0


class Rows(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return product()[index]


def test_a_dataloader_worker_runs_kernels():
    product()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(
            DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context="fork")
        )
    torch.testing.assert_close(torch.cat(batches), (X @ WEIGHT.T)[:4], rtol=1e-13, atol=1e-13)
