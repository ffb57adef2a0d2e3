"""The tensor-core kernel of sparse products in 16 bits, its logic run on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot.ops import masked_matmul_cuda as cuda
from jacpot.ops.masked_matmul_vectors import Vectors, multiply_vectors

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # results are rounded once, at the end


def problem(rows, columns, batch, density, seed, dtype, feature_major=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator).to(dtype) * mask
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    return mask, weight, x.t().contiguous().t() if feature_major else x


def cut(mask):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Vectors.of(offsets, mask.nonzero()[:, 1], mask.shape[1])


def close(got, expected, dtype):
    # What is summed is of the size of one; it may cancel.
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(
    shape=st.tuples(
        st.integers(1, 70),
        st.integers(1, 300),
        st.sampled_from([0, 1, 7, 8, 64, 65, 80]),
        st.sampled_from([0.0, 0.02, 0.1, 1.0]),
        st.integers(0, 99),
    ),
    feature_major=st.booleans(),
    relu=st.booleans(),
)
def test_product(emulated_cuda, dtype, shape, feature_major, relu):
    mask, weight, x = problem(*shape, dtype, feature_major)
    bias = torch.linspace(-1, 1, len(mask)).to(dtype) if shape[4] % 2 else None
    out = cuda._empty(x, len(mask), feature_major).fill_(torch.nan)
    got = multiply_vectors(cut(mask), x, weight[mask], bias, relu, out)
    assert got is out
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    close(got, expected.relu() if relu else expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_windows_than_a_block_has(emulated_cuda, dtype):
    mask, weight, x = problem(700, 250, 9, 0.02, 1, dtype)
    out = multiply_vectors(cut(mask), x, weight[mask], None, False, x.new_empty(9, 700))
    close(out, x.double() @ weight.double().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 30, 3), (700, 5000, 130), (1100, 260, 64)], ids=str)
@pytest.mark.parametrize("feature_major", [False, True])
def test_product_on_a_gpu(real_gpu, dtype, shape, feature_major):
    rows, columns, batch = shape
    mask, weight, x = problem(rows, columns, batch, 0.01, 1, dtype, feature_major)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    moved = x.to(real_gpu)
    out = cuda._empty(moved, rows, feature_major).fill_(torch.nan)
    multiply_vectors(
        cut(mask.to(real_gpu)), moved, weight[mask].to(real_gpu), bias.to(real_gpu), False, out
    )
    close(out.cpu(), x.double() @ weight.double().t() + bias.double(), dtype)


def test_relu_keeps_nan_and_results_are_rounded_to_nearest(emulated_cuda):
    mask = torch.ones(2, 1, dtype=torch.bool)
    values = torch.tensor([float("nan"), 1.0]).bfloat16()
    x = torch.tensor([[1.0], [-2.0]]).bfloat16()
    out = multiply_vectors(cut(mask), x, values, None, True, x.new_empty(2, 2))
    assert out[:, 0].isnan().all()
    assert out[:, 1].tolist() == [1.0, 0.0]
    x, values = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([1.0, 2**-8]).bfloat16()
    for sign, expected in ((1, 1.0), (3, 1 + 2**-6)):  # halves to even: 1 + 2⁻⁸, 1 + 3·2⁻⁸
        out = multiply_vectors(
            cut(torch.ones(1, 2, dtype=torch.bool)),
            x,
            values * torch.tensor([1.0, sign]).bfloat16(),
            None,
            False,
            x.new_empty(1, 1),
        )
        assert out.item() == expected


def test_vectors_hold_what_is_kept_and_neighbours_lie_in_different_banks(emulated_cuda):
    mask, _, _ = problem(64, 1000, 1, 0.03, 5, torch.float32)
    vectors = cut(mask)
    tiles = -(-1000 // vectors.tile)
    assert vectors.begins.shape == (4, tiles + 1)
    assert len(vectors.slots.unique()) == mask.sum()
    conflicts = eights = 0
    for window in range(4):
        for tile in range(tiles):
            begin, end = vectors.begins[window, tile : tile + 2].tolist()
            columns = vectors.columns[begin:end].flatten()
            held = columns[columns < vectors.tile].sort().values + tile * vectors.tile
            inside = slice(tile * vectors.tile, (tile + 1) * vectors.tile)
            kept = mask[window * 16 : window * 16 + 16, inside].any(0).nonzero()[:, 0]
            assert torch.equal(held, kept + tile * vectors.tile)
            whole = columns[columns < vectors.tile]
            for eight in whole[: len(whole) // 8 * 8].view(-1, 8):
                eights += 1
                conflicts += (eight % 8).bincount().max().item() - 1
    assert conflicts < 0.75 * eights  # in a random order about 1.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_major", [False, True])
def test_operators_take_the_way_that_costs_least(emulated_cuda, monkeypatch, dtype, feature_major):
    taken = []

    def record(*arguments):
        taken.append("vectors")
        return multiply_vectors(*arguments)

    monkeypatch.setattr(cuda, "multiply_vectors", record)
    # Squares of 16 are kept or not, so that vectors are full both ways.
    squares = torch.arange(6 * 25).view(6, 25) % 19 == 0
    mask = squares.repeat_interleave(16, 0).repeat_interleave(16, 1)
    weight = torch.randn(96, 400).to(dtype) * mask
    x, dy = torch.randn(70, 400).to(dtype), torch.randn(70, 96).to(dtype)
    if feature_major:
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    pattern, values = jacpot.Pattern(mask), weight[mask]
    y = cuda._forward(x, values, None, pattern.block, 96, False, feature_major)
    close(y, x.double() @ weight.double().t(), dtype)
    assert y.t().is_contiguous() if feature_major else y.is_contiguous()
    dx, nothing = cuda._backward(dy, x, values, pattern.block, True, False)
    close(dx, dy.double() @ weight.double(), dtype)
    assert not nothing.numel()
    assert taken == ["vectors", "vectors"]
    dx, d_values = cuda._backward(dy, x, values, pattern.block, True, True)
    close(dx, dy.double() @ weight.double(), dtype)
    close(d_values, (dy.double().t() @ x.double())[mask], dtype)


def test_the_model_of_costs(emulated_cuda):
    """Of what a GPU of 227 KiB would take at 4096², by the number of zeros."""
    emulated_cuda.configure(shared_bytes=227 * 1024)
    ways = []
    for zeros in (0.5, 0.95, 0.99):
        mask = torch.rand(1024, 4096, generator=torch.Generator().manual_seed(0)) > zeros
        walk = cuda.prepare(jacpot.Pattern(mask).block).rows
        assert cuda._fastest(walk, 1024, torch.float32) == ("dense" if zeros < 0.6 else "walk")
        ways.append(cuda._fastest(walk, 1024, torch.bfloat16))
    assert ways == ["dense", "dense", "vectors"]


def test_refusals(emulated_cuda):
    mask, weight, x = problem(4, 5, 3, 1.0, 0, torch.bfloat16)
    vectors = cut(mask)
    with pytest.raises(TypeError, match="'product' must be bfloat16 or float16, got float32"):
        multiply_vectors(vectors, x, weight[mask], None, False, torch.empty(3, 4))
    with pytest.raises(ValueError, match=r"'bias' must have shape \(4,\), got \(5,\)"):
        multiply_vectors(vectors, x, weight[mask], x.new_zeros(5), False, x.new_empty(3, 4))
