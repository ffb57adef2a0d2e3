"""The tensor-core kernel of sparse products in 16 bits, its logic run on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot.ops import masked_matmul_cuda as cuda
from jacpot.ops.masked_matmul_slots import TILES, Slots, multiply_slots

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # results are rounded once, at the end


def problem(rows, columns, batch, density, seed, dtype, feature_major=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    if seed % 3 == 1:
        mask[:: max(1, rows // 3)] = True  # a few long rows
    if seed % 3 == 2:
        mask[:, torch.arange(columns) % 8 != 3] = False  # what would all lie in one bank
    weight = torch.randn(rows, columns, generator=generator).to(dtype) * mask
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    return mask, weight, x.t().contiguous().t() if feature_major else x


def deal(mask):
    offsets = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Slots.of(offsets, mask.nonzero()[:, 1], mask.shape[1])


def close(got, expected, dtype):
    # What is summed is of the size of one; it may cancel.
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


shapes = st.tuples(
    st.integers(1, 70),
    st.one_of(st.integers(1, 300), st.sampled_from([8, 96, 200, 304])),
    st.sampled_from([0, 1, 7, 8, 64, 65, 80]),
    st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    st.integers(0, 99),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(shape=shapes, feature_major=st.booleans(), transposed=st.booleans(), relu=st.booleans())
def test_product(emulated_cuda, dtype, shape, feature_major, transposed, relu):
    mask, weight, x = problem(*shape, dtype, feature_major)
    bias = torch.linspace(-1, 1, len(mask)).to(dtype) if shape[4] % 2 else None
    out = cuda._empty(x, len(mask), transposed).fill_(torch.nan)
    got = multiply_slots(deal(mask), x, weight[mask], bias, relu, out)
    assert got is out
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    close(got, expected.relu() if relu else expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processors", [1, 64])
def test_more_warps_than_a_block_has(emulated_cuda, dtype, processors):
    emulated_cuda.configure(multiprocessors=processors)
    mask, weight, x = problem(1100, 256, 9, 0.02, 1, dtype)
    out = multiply_slots(deal(mask), x, weight[mask], None, False, x.new_empty(9, 1100))
    close(out, x.double() @ weight.double().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_products_of_any_strides(emulated_cuda, dtype):
    mask, weight, x = problem(30, 80, 21, 0.2, 3, dtype)
    slots, expected = deal(mask), x.double() @ weight.double().t()
    rows = torch.cat([x, x], 1)[:, :80]  # a view whose rows begin at multiples of 16 bytes
    odd = torch.cat([x, x[:, :1]], 1)[:, :80]
    shifted = torch.cat([x[:1, :1].expand(21, 1), x], 1)[:, 1:]
    for given_x in (rows, odd, shifted, torch.stack([x, x], 2)[:, :, 0]):
        wide = x.new_full((21, 37), torch.nan)
        multiply_slots(slots, given_x, weight[mask], None, False, wide[:, 3:33])
        close(wide[:, 3:33], expected, dtype)
        assert wide[:, :3].isnan().all()
        assert wide[:, 33:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 30, 3), (700, 5000, 130), (1100, 264, 64)], ids=str)
@pytest.mark.parametrize("feature_major", [False, True])
def test_product_on_a_gpu(real_gpu, dtype, shape, feature_major):
    rows, columns, batch = shape
    mask, weight, x = problem(rows, columns, batch, 0.01, 1, dtype, feature_major)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    moved = x.to(real_gpu)
    out = cuda._empty(moved, rows, feature_major).fill_(torch.nan)
    multiply_slots(
        deal(mask.to(real_gpu)), moved, weight[mask].to(real_gpu), bias.to(real_gpu), False, out
    )
    close(out.cpu(), x.double() @ weight.double().t() + bias.double(), dtype)


def test_relu_keeps_nan_and_results_are_rounded_to_nearest(emulated_cuda):
    mask = torch.eye(2, 16, dtype=torch.bool)
    values = torch.tensor([float("nan"), 1.0]).bfloat16()
    x = torch.zeros(2, 16).bfloat16()
    x[:, 0], x[:, 1] = 1, torch.tensor([1.0, -2.0])
    mask[0, 1] = mask[1, 0] = False
    out = multiply_slots(deal(mask), x, values, None, True, x.new_empty(2, 2))
    assert out[:, 0].isnan().all()
    assert out[:, 1].tolist() == [1.0, 0.0]
    x, values = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([1.0, 2**-8]).bfloat16()
    for sign, expected in ((1, 1.0), (3, 1 + 2**-6)):  # halves to even: 1 + 2⁻⁸, 1 + 3·2⁻⁸
        out = multiply_slots(
            deal(torch.ones(1, 2, dtype=torch.bool)),
            x,
            values * torch.tensor([1.0, sign]).bfloat16(),
            None,
            False,
            x.new_empty(1, 1),
        )
        assert out.item() == expected


def test_examples_do_not_meet_and_windows_do_not_either(emulated_cuda):
    """An activation that is not finite stays in its example, and in the window of its entry."""
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[3, 5] = mask[12, 6] = True
    x = torch.ones(4, 24).bfloat16()
    x[1, 5] = torch.inf
    x[2, 7] = torch.nan  # of a column that nothing is kept of
    y = multiply_slots(deal(mask), x, x.new_ones(2), None, False, x.new_empty(4, 16))
    assert y[1, 3] == torch.inf
    assert y[[0, 2, 3]].equal(mask.any(1).bfloat16().expand(3, 16))
    assert y[1, 8:].equal(mask.any(1).bfloat16()[8:])


@settings(max_examples=25)
@given(shape=shapes)
def test_every_entry_has_one_slot_in_its_bank_while_its_column_is_there(cuda_emulator, shape):
    cuda_emulator.configure(shared_bytes=20 * 1024)  # tiles of 32 columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda._backend, "cuda", lambda: cuda_emulator)
        patch.setattr(cuda._backend, "queue", lambda tensor: (0, 0))
        mask, _, _ = problem(*shape, torch.bfloat16)
        slots = deal(mask)
    tile = slots.tile
    tiles = -(-mask.shape[1] // tile)
    used = slots.sources >= 0
    assert slots.sources[used].sort().values.tolist() == list(range(int(mask.sum())))
    steps = torch.arange(len(used)) % 16
    banks = steps // 4 * 2 + steps % 2
    place = slots.places.long() // 8
    assert torch.equal(place % 8, banks)
    assert (place[~used] >= TILES * tile).all()
    # Where blocks lie says with which tile, and for which window, they are taken.
    group = torch.arange(len(slots.begins) - 1).repeat_interleave(slots.begins.diff().long())
    group = group.repeat_interleave(16)
    now, window = group // 4 % tiles, slots.windows[group // 4 // tiles, group % 4]
    ring = place // tile
    own = now - (now - ring) % TILES
    assert ((now - own)[used] < TILES - 1).all()
    assert (own[used] >= 0).all()
    entries = mask.nonzero()
    row, column = entries[slots.sources[used].long()].unbind(1)
    assert torch.equal(row, window[used] * 8 + slots.places[used] % 8)
    octet = own[used] * tile + place[used] % tile // 8 * 8
    assert torch.equal(octet, column // 8 * 8)
    turned = (column + slots.rotations[column // 8]) % 8
    assert torch.equal(turned, banks[used])


def test_few_slots_stay_empty_and_warps_keep_pace(emulated_cuda):
    """At 98 % of zeros; without the freedom that entries have it would be 1.4 and 1.1."""
    emulated_cuda.configure(shared_bytes=227 * 1024)
    slots = deal(torch.rand(1024, 4096, generator=torch.Generator().manual_seed(0)) < 0.02)
    assert slots.blocks * 16 < 1.2 * 1024 * 4096 * 0.02
    steps = slots.begins.diff().view(2, 16, -1, 4).sum(-1).double()  # of each warp and tile
    assert steps.amax(1).sum() < 1.07 * steps.mean(1).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_major", [False, True])
def test_operators_take_the_way_that_costs_least(emulated_cuda, monkeypatch, dtype, feature_major):
    taken = []

    def record(*arguments):
        taken.append("slots")
        return multiply_slots(*arguments)

    monkeypatch.setattr(cuda, "multiply_slots", record)
    mask = torch.rand(96, 400, generator=torch.Generator().manual_seed(0)) < 0.01
    monkeypatch.setattr(cuda, "_fastest", lambda walk, n, dtype: "slots")
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
    assert taken == ["slots", "slots"]
    dx, d_values = cuda._backward(dy, x, values, pattern.block, True, True)
    close(dx, dy.double() @ weight.double(), dtype)
    close(d_values, (dy.double().t() @ x.double())[mask], dtype)


def test_the_model_of_costs(emulated_cuda):
    """Of what a GPU of 227 KiB would take at 4096², by the number of zeros."""
    emulated_cuda.configure(shared_bytes=227 * 1024)
    ways = []
    for zeros in (0.5, 0.95, 0.98, 0.99):
        mask = torch.rand(1024, 4096, generator=torch.Generator().manual_seed(0)) > zeros
        walk = cuda.prepare(jacpot.Pattern(mask).block).rows
        assert cuda._fastest(walk, 1024, torch.float32) == ("dense" if zeros < 0.6 else "walk")
        ways.append(cuda._fastest(walk, 1024, torch.bfloat16))
    assert ways == ["dense", "dense", "slots", "slots"]


def test_refusals(emulated_cuda):
    mask, weight, x = problem(4, 5, 3, 1.0, 0, torch.bfloat16)
    slots = deal(mask)
    with pytest.raises(TypeError, match="'product' must be bfloat16 or float16, got float32"):
        multiply_slots(slots, x, weight[mask], None, False, torch.empty(3, 4))
    with pytest.raises(ValueError, match=r"'bias' must have shape \(4,\), got \(5,\)"):
        multiply_slots(slots, x, weight[mask], x.new_zeros(5), False, x.new_empty(3, 4))
    with pytest.raises(ValueError, match="'gathered' must have the batch of 'product'"):
        multiply_slots(slots, x, weight[mask], None, False, x.new_empty(30, 4))
