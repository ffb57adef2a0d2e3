"""What only a GPU can show: streams, graphs, memory, other devices; and the guard without one."""

from __future__ import annotations

import pretend_streams
import pytest
import torch

import jacpot
from jacpot import _backend
from jacpot.ops import jacobian as ops
from jacpot.ops import masked_matmul_cuda, masked_matmul_slots
from jacpot.ops.jacobian_windows import windows


def everything(device):
    """Call one function of each kernel; give the functions and their results."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    pattern = jacpot.Pattern((torch.rand(90, 300, generator=generator) < 0.05).to(device))
    x, values, dy = normal(500, 300), normal(pattern.nnz), normal(500, 90)
    half = x.bfloat16(), values.bfloat16()
    slots = masked_matmul_cuda.prepare(pattern.block).rows.slots
    blocks = [ops.Factors(normal(40, 1, 1, 300), normal(40, 3, 1, 1, 90), pattern, bias=True)]
    u, v = normal(40, 3), normal(pattern.nnz + 90)
    root = normal(50, 100)
    matrix, rhs = root @ root.T, normal(50, 3)
    return [
        lambda: jacpot.masked_matmul(x, values, pattern),
        lambda: jacpot.masked_matmul(*half, pattern),
        lambda: torch.ops.jacpot.masked_matmul_backward(dy, x, values, pattern.block, True, True),
        lambda: ops.gram(blocks),
        lambda: ops.gram(blocks, precision="tf32"),
        lambda: ops.gram(blocks, precision="3xtf32"),
        lambda: masked_matmul_slots.multiply_slots(
            slots, half[0], half[1], None, False, half[0].new_empty(500, 90)
        ),
        lambda: ops.jvp(blocks, [v]),
        lambda: ops.vjp(blocks, u),
        lambda: ops.sketch(blocks, 64),
        lambda: ops.sketch(blocks, 64, kind="sparse"),
        lambda: jacpot.solve(matrix, rhs, method="cg", tol=1e-3, max_iter=40).x,
    ]


def flat(results):
    for result in results:
        if isinstance(result, (list, tuple)):
            yield from flat(result)
        else:
            yield result


def test_results_do_not_depend_on_the_stream(real_gpu):
    calls = everything(real_gpu)
    expected = list(flat(call() for call in calls))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    # The default stream is kept busy: work that went there by mistake would come too late.
    busy = torch.randn(4096, 4096, device=real_gpu)
    for _ in range(20):
        busy = busy @ busy / 64
    with torch.cuda.stream(side):
        got = list(flat(call() for call in calls))
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gpu", ["pretended"], indirect=True)
def test_what_is_kept_is_waited_for_once(gpu):
    """What a pattern is prepared into has to be there before another stream reads it."""

    def waits(call):
        before = pretend_streams.Current.waits
        call()
        return pretend_streams.Current.waits - before

    mask = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    pattern = jacpot.Pattern(mask.to(gpu))
    x, values = torch.ones(3, 40).to(gpu), torch.ones(pattern.nnz).to(gpu)
    few = jacpot.Pattern((mask & mask.roll(1)).to(gpu))
    a, s = torch.ones(3, 1, 1, 40).to(gpu), torch.ones(3, 2, 1, 1, 9).to(gpu)
    image = torch.ones(2, 3, 5, 7).to(gpu)
    for call in (
        lambda: jacpot.masked_matmul(x, values, pattern),
        lambda: jacpot.masked_matmul(x.half(), torch.ones(few.nnz).half().to(gpu), few),
        lambda: ops.gram([ops.Factors(a, s, pattern)]),
        lambda: windows(image, (3, 2), (1, 1), (1, 1)),
    ):
        assert waits(call) > 0
        assert waits(call) == 0


def test_products_do_not_wait_for_the_device(real_gpu):
    calls = everything(real_gpu)[:7]
    for call in calls:
        call()  # patterns are prepared at their first use
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_products_can_be_captured(real_gpu):
    product, _, backward, *_ = everything(real_gpu)
    expected = list(flat([product(), backward()]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = list(flat([product(), backward()]))
    for tensor in got:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_the_same_on_the_last_device(real_gpu):
    """With one GPU this is the first; with more, the current device is another one."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    expected = list(flat(call() for call in everything(torch.device("cuda", 0))))
    got = list(flat(call() for call in everything(last)))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == last
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


def test_out_of_memory_leaves_nothing_behind(real_gpu):
    x = torch.randn(1 << 20, 1, 1, 1, device=real_gpu)
    blocks = [ops.Factors(x, torch.randn(1 << 20, 1, 1, 1, 1, device=real_gpu))]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        ops.gram(blocks)  # 4 TB
    assert torch.cuda.memory_allocated() == before
    row = ops.gram([ops.Rows(torch.ones(2, 1, 3, device=real_gpu))], outputs="trace")
    assert torch.equal(row, torch.full((2, 2), 3.0, device=real_gpu))


def test_arguments_on_two_devices_are_refused(gpu):
    pattern = jacpot.Pattern(torch.ones(3, 4, dtype=torch.bool))
    moved = jacpot.Pattern(torch.ones(3, 4, dtype=torch.bool).to(gpu))
    x, values, bias = torch.ones(2, 4), torch.ones(12), torch.ones(3)
    with pytest.raises(ValueError, match="'x' must be on cuda:0 like the pattern, got cpu"):
        torch.ops.jacpot.masked_matmul(x, values.to(gpu), None, moved.block, 3, False, False)
    with pytest.raises(ValueError, match="'values' must be on cuda:0 like the pattern, got cpu"):
        jacpot.masked_matmul(x.to(gpu), values, moved)
    with pytest.raises(ValueError, match="'bias' must be on cuda:0 like the pattern, got cpu"):
        jacpot.masked_matmul(x.to(gpu), values.to(gpu), moved, bias)
    with pytest.raises((ValueError, RuntimeError), match=r"cpu|CPU"):
        jacpot.masked_matmul(x.to(gpu), values.to(gpu), pattern)
    matrix = torch.eye(4)
    with pytest.raises(ValueError, match="'operator' must be on cuda:0 like 'rhs', got cpu"):
        jacpot.solve(matrix, values[:4].to(gpu))
    with pytest.raises(ValueError, match="'x0' must be on cuda:0 like 'rhs', got cpu"):
        jacpot.solve(matrix.to(gpu), values[:4].to(gpu), x0=values[:4], method="cg")
    a, s = torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="'signals' must be on cuda:0 like 'activations', got cpu"):
        ops.Factors(a.to(gpu), s)
    block = ops.Factors(a.to(gpu), s.to(gpu))
    with pytest.raises(ValueError, match=r"'vectors\[0\]' must be on cuda:0 like the blocks, got"):
        ops.jvp([block], [torch.ones(12)])
    with pytest.raises(ValueError, match="'u' must be on cuda:0 like the blocks, got cpu"):
        ops.vjp([block], torch.ones(2, 1))
    with pytest.raises(ValueError, match="'out' must be on cuda:0 like 'left', got cpu"):
        ops.gram([block], out=torch.ones(2, 1, 2, 1))


def test_kernels_run_on_the_device_of_their_tensors(cuda_emulator):
    """And leave the current device as it was; two GPUs are pretended to."""
    square, columns = torch.ones(4, 4), torch.ones(4, 1, dtype=torch.float64)
    signs, partial = torch.empty(3, 5), torch.empty(1, 1, dtype=torch.float64)
    offsets, indices = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    a, s = torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 1, 4)
    layer = ((a, s), None, None, None, False)
    calls = [
        lambda *q: cuda_emulator.jacobian_mirror(square, *q),
        lambda *q: cuda_emulator.jacobian_signs(0, 0, 0, signs, *q),
        lambda *q: cuda_emulator.jacobian_gram([layer], "trace", "tf32", torch.empty(2, 2), *q),
        lambda *q: cuda_emulator.masked_matmul_slots(
            torch.zeros(1, dtype=torch.uint8),
            torch.tensor([[0, 1, 1, 1]], dtype=torch.int32),
            torch.zeros(5, dtype=torch.int32),
            torch.empty(0, dtype=torch.int16),
            torch.empty(0, dtype=torch.int32),
            8,
            torch.empty(0).bfloat16(),
            torch.empty(32, dtype=torch.int32),
            torch.ones(2, 8).bfloat16(),
            None,
            False,
            torch.empty(8, 8).bfloat16(),
            *q,
        ),
        lambda *q: cuda_emulator.cg_curvature(columns, columns, 0.0, partial, *q),
        lambda *q: cuda_emulator.masked_matmul_tile_offsets(
            offsets, indices, 2, 2, torch.empty(1, 2, dtype=torch.int32), *q
        ),
    ]
    for call in calls:
        for number in (0, 1):
            call(number, 0)
            assert cuda_emulator.devices() == (0, number)
        with pytest.raises(ValueError, match="there is no GPU of this number"):
            call(2, 0)
        assert cuda_emulator.devices()[0] == 0


@pytest.mark.parametrize("number", [0, 1, 7])
def test_kernels_are_told_the_device_and_stream_of_their_tensors(monkeypatch, number):
    """The queue of a tensor: its own device, and the caller's current stream there."""

    class Stream:
        def __init__(self, device):
            self.device_index, self.cuda_stream = device.index, 1000 + device.index

    class OnDevice:
        device = torch.device("cuda", number)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert _backend.queue(OnDevice()) == (number, 1000 + number)
