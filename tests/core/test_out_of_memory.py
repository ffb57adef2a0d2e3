"""What a call on a GPU leaves behind when its memory ends: nothing, wherever that happens."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jacpot
from jacpot import _backend
from jacpot.linalg import cuda as solvers
from jacpot.linalg.operator import DenseOperator
from jacpot.ops import jacobian as ops
from jacpot.ops import masked_matmul_cuda as products
from jacpot.ops.masked_matmul_slots import multiply_slots


class Full(TorchDispatchMode):
    """Memory that is full from the n-th tensor on."""

    def __init__(self, tensors):
        super().__init__()
        self.left, self.failed = tensors, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        makes = not func.is_view and not func._schema.is_mutable and bool(func._schema.returns)
        if makes and self.left == 0:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.left -= makes
        return func(*args, **(kwargs or {}))


def calls():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(20, 40, generator=generator) < 0.2
    pattern = jacpot.Pattern(mask)
    x, dy, values = normal(9, 40), normal(9, 20), normal(pattern.nnz)
    half, half_values = x.bfloat16(), values.bfloat16()
    blocks = [ops.Factors(normal(4, 1, 1, 40), normal(4, 2, 1, 1, 20), pattern, bias=True)]
    root, b = normal(12, 20).double(), normal(12, 2).double()
    matrix = root @ root.T + torch.eye(12)

    def solve():
        x = torch.zeros_like(b)
        solvers.iterate("cg", DenseOperator(matrix), b, x, 0.0, None, 1e-2, 8, None)
        return x

    def slots():
        prepared = products.prepare(pattern.block).rows.slots
        return multiply_slots(prepared, half, half_values, None, False, half.new_empty(9, 20))

    block = pattern.block
    return {
        "forward": lambda: products._forward(x, values, None, block, 20, False, False),
        "backward": lambda: products._backward(dy, x, values, block, True, True),
        "slots": slots,
        "gram": lambda: ops.gram(blocks),
        "jvp": lambda: ops.jvp(blocks, [torch.ones(pattern.nnz + 20)]),
        "vjp": lambda: ops.vjp(blocks, torch.ones(4, 2)),
        "sketch": lambda: ops.sketch(blocks, 8),
        "solve": solve,
    }


def tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.fixture
def few_objects():
    """Let the collector look at what is made from now on alone: there are a million before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(call, room):
    """Give the call's result and None, or None and where memory ended."""
    memory = Full(room)
    try:
        with memory:
            found = call()
    except torch.OutOfMemoryError:
        return None, memory.failed
    return found, memory.failed


@pytest.mark.parametrize("name", list(calls()))
def test_memory_may_end_anywhere(cuda_emulator, few_objects, monkeypatch, name):
    """The error is PyTorch's, no tensor stays, and the next call gives what it should."""
    cuda_emulator.configure(shared_bytes=164 * 1024, multiprocessors=2, order=0)
    monkeypatch.setattr(_backend, "cuda", lambda: cuda_emulator)
    monkeypatch.setattr(_backend, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(_backend, "queue", lambda tensor: (0, 0))
    expected, call = calls()[name](), calls()[name]
    # First while patterns are not prepared yet, then once more.
    for prepared in (False, True):
        room, failed = 0, True
        while failed:
            before = tensors() if room % 8 == 1 else None
            found, failed = run(call, room)
            assert (found is None) == failed
            if before is not None and failed and prepared:
                assert tensors() == before
            room += 1
        assert room > 1
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(call(), expected)
