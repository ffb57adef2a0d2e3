"""The CUDA kernels of the sparse products, their logic run on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot import _backend
from jacpot.ops import jacobian as ops
from jacpot.ops import masked_matmul_cuda as cuda
from jacpot.ops import masked_matmul_slots as slots

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sums are in float32 (float64 for float64); 16-bit results are rounded once, at the end.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def problem(rows, columns, batch, density, seed, dtype, strides="row"):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator).to(dtype) * mask
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    dy = torch.randn(batch, rows, generator=generator).to(dtype)
    if strides == "feature":
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    elif strides == "odd":
        x = torch.stack([x, x], 2)[:, :, 0]
        dy = torch.cat([dy, dy], 1)[:, :rows]
    return mask, weight, x, dy


def walk_of(mask):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return cuda.Walk.of(offsets, mask.nonzero()[:, 1], mask.shape[1])


def close(got, expected, dtype):
    # What is summed is of the size of one; it may cancel.
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


shapes = st.tuples(
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(0, 80),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 99),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(shape=shapes, strides=st.sampled_from(["row", "feature", "odd"]), relu=st.booleans())
def test_product(emulated_cuda, dtype, shape, strides, relu):
    mask, weight, x, _ = problem(*shape, dtype, strides)
    bias = torch.linspace(-1, 1, len(mask)).to(dtype) if shape[4] % 2 else None
    y = cuda.multiply(walk_of(mask), x, weight[mask], bias, relu, feature_major=relu)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    close(y, expected.relu() if relu else expected, dtype)
    assert y.shape == (len(x), len(mask))
    assert y.dtype == dtype
    assert y.t().is_contiguous() if relu else y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(shape=shapes, strides=st.sampled_from(["row", "feature", "odd"]), fused=st.booleans())
def test_gradients(emulated_cuda, dtype, shape, strides, fused):
    mask, weight, x, dy = problem(*shape, dtype, strides)
    values = weight.t()[mask.t()]  # in the order of the transposed walk
    dx, d_values = cuda.multiply_and_sample(
        walk_of(mask.t()), dy, values if fused else None, x, feature_major=False
    )
    close(d_values, (x.double().t() @ dy.double())[mask.t()], dtype)
    if fused:
        close(dx, dy.double() @ weight.double(), dtype)
    else:
        assert dx is None


def test_what_is_not_kept_is_not_touched(emulated_cuda):
    """An infinite activation of a pruned weight must not become NaN through zero times infinity."""
    mask = torch.tensor([[True, False, True], [True, False, False]])
    x = torch.tensor([[1.0, float("inf"), 2.0], [1.0, float("nan"), 2.0]])
    y = cuda.multiply(walk_of(mask), x, torch.ones(3), None, False, False)
    assert torch.equal(y, torch.tensor([[3.0, 1.0], [3.0, 1.0]]))


@pytest.mark.parametrize("batch", [1, 8, 9])
@pytest.mark.parametrize("stride", [1, 8, 48])
def test_a_single_column_in_16_bits(emulated_cuda, monkeypatch, batch, stride):
    """Whose stride says nothing: PyTorch's versions give others."""

    def restrided(x):
        return torch.as_strided(plain(x), (1, -(-len(x) // 8) * 8), (stride, 1))

    plain = slots.columns_first
    for module in (cuda, slots):
        monkeypatch.setattr(module, "columns_first", restrided)
    x = torch.arange(1.0, batch + 1).to(torch.bfloat16)[:, None]  # (N, 1), of strides (1, 1)
    mask, values = torch.ones(1, 1, dtype=torch.bool), torch.full((1,), 2.0).to(x.dtype)
    walk = walk_of(mask)
    assert torch.equal(cuda.multiply(walk, x, values, None, False, False), 2 * x)
    out = torch.empty_like(x)
    assert torch.equal(slots.multiply_slots(walk.slots, x, values, None, False, out), 2 * x)


@pytest.mark.parametrize("stride", [1, 8, 16])
def test_a_single_example_in_16_bits(emulated_cuda, stride):
    x = torch.arange(16.0).to(torch.bfloat16).as_strided((1, 16), (stride, 1))
    walk, values = walk_of(torch.eye(16, dtype=torch.bool)), torch.full((16,), 2.0).to(x.dtype)
    assert torch.equal(cuda.multiply(walk, x, values, None, False, False), 2 * x)
    out = torch.empty_like(x)
    assert torch.equal(slots.multiply_slots(walk.slots, x, values, None, False, out), 2 * x)


def test_a_gpu_with_too_little_shared_memory_is_refused(emulated_cuda):
    a, s = torch.ones(200, 1, 1, 3), torch.ones(200, 1, 1, 1, 4)
    emulated_cuda.configure(shared_bytes=99 * 1024)
    with pytest.raises(NotImplementedError, match="more shared memory than this GPU has"):
        ops.gram([ops.Factors(a, s)])


def test_relu_keeps_nan(emulated_cuda):
    mask = torch.tensor([[True], [True]])
    y = cuda.multiply(
        walk_of(mask), torch.ones(1, 1), torch.tensor([float("nan"), -1.0]), None, True, False
    )
    assert y[0, 0].isnan()
    assert y[0, 1] == 0


def test_values_that_begin_anywhere(emulated_cuda):
    mask, weight, x, _ = problem(9, 33, 5, 0.5, 3, torch.float32)
    values = torch.cat([torch.zeros(1), weight[mask]])[1:]
    assert values.data_ptr() % 16
    close(cuda.multiply(walk_of(mask), x, values, None, False, False), x @ weight.t(), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_more_panels_than_splits(emulated_cuda, dtype):
    mask, weight, x, dy = problem(6, 20, 700, 0.4, 1, dtype)
    dx, d_values = cuda.multiply_and_sample(
        walk_of(mask.t()), dy, weight.t()[mask.t()], x, feature_major=True
    )
    close(d_values, (x.double().t() @ dy.double())[mask.t()], dtype)
    close(dx, dy.double() @ weight.double(), dtype)


def test_a_long_row_beside_short_ones(emulated_cuda):
    mask = torch.zeros(40, 700, dtype=torch.bool)
    mask[7] = True
    mask[torch.arange(40), torch.arange(40)] = True
    weight = torch.randn(40, 700) * mask
    x = torch.randn(3, 700)
    y = cuda.multiply(walk_of(mask), x, weight[mask], None, False, False)
    close(y, x.double() @ weight.double().t(), x.dtype)


def test_arguments_on_another_device_or_of_another_dtype_are_refused(emulated_cuda):
    mask, weight, x, _ = problem(4, 5, 3, 1.0, 0, torch.float32)
    walk = walk_of(mask)
    with pytest.raises(TypeError, match="'values' must be float32, got float64"):
        cuda.multiply(walk, x, weight[mask].double(), None, False, False)
    with pytest.raises(ValueError, match=r"'bias' must have shape \(4,\), got \(5,\)"):
        cuda.multiply(walk, x, weight[mask], torch.zeros(5), False, False)
    with pytest.raises(TypeError, match=r"must be float16 or .* float64, got int64"):
        cuda.multiply(walk, x.long(), weight[mask], None, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15)
@given(shape=shapes, feature_major=st.booleans())
def test_operators(emulated_cuda, dtype, shape, feature_major):
    """The functions that PyTorch calls for CUDA tensors, on both sides of the dense break-even."""
    mask, weight, x, dy = problem(*shape, dtype, "feature" if feature_major else "row")
    pattern = jacpot.Pattern(mask)
    values = weight[mask]
    block = pattern.block
    y = cuda._forward(x, values, None, block, len(mask), False, feature_major)
    close(y, x.double() @ weight.double().t(), dtype)
    dx, d_values = cuda._backward(dy, x, values, block, True, True)
    close(dx, dy.double() @ weight.double(), dtype)
    close(d_values, (dy.double().t() @ x.double())[mask], dtype)
    assert torch.equal(cuda._compress(weight, block, pattern.nnz), values)
    assert torch.equal(cuda._expand(values, block, *mask.shape), weight)


def test_a_pattern_is_prepared_once(emulated_cuda):
    pattern = jacpot.Pattern(torch.ones(3, 4, dtype=torch.bool))
    assert cuda.prepare(pattern.block) is cuda.prepare(pattern.block)


def test_tensors_on_other_devices_than_the_pattern_are_refused(emulated_cuda):
    block = jacpot.Pattern(torch.ones(3, 4, dtype=torch.bool)).block
    elsewhere = torch.empty(2, 4, device="meta")
    with pytest.raises(ValueError, match="'x' must be on cpu like the pattern, got meta"):
        cuda._forward(elsewhere, torch.zeros(12), None, block, 3, False, False)
    with pytest.raises(ValueError, match="'dy' must be on cpu like the pattern, got meta"):
        cuda._backward(elsewhere, torch.zeros(2, 4), torch.zeros(12), block, True, True)


def test_without_cuda_the_build_says_so():
    if _backend.build_info()["cuda_built"] is not None:
        pytest.skip("this build has CUDA")
    with pytest.raises(NotImplementedError, match="built without CUDA: build it where nvcc is"):
        _backend.cuda()
