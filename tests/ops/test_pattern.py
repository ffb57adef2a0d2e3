"""Compiling a mask, and moving weights into and out of its order."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot.reference import masked_matmul as oracle

SIZES = st.integers(0, 70)


@st.composite
def masks(draw):
    rows, columns = draw(SIZES), draw(SIZES)
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(rows, columns, generator=generator) < density


@settings(deadline=None, max_examples=60)
@given(masks())
def test_describes_the_mask(mask):
    pattern = jacpot.Pattern(mask)
    rows, columns = mask.nonzero(as_tuple=True)
    assert pattern.shape == tuple(mask.shape)
    assert pattern.nnz == len(rows)
    assert pattern.density == (len(rows) / mask.numel() if mask.numel() else 0.0)
    assert torch.equal(pattern.mask(), mask)
    assert torch.equal(pattern.column_indices.to(torch.int64), columns)
    assert torch.equal(pattern.row_offsets.diff().to(torch.int64), mask.sum(1))
    assert torch.equal(pattern.column_offsets.diff().to(torch.int64), mask.sum(0))
    by_column = torch.argsort(columns, stable=True)
    assert torch.equal(pattern.permutation, by_column)
    assert torch.equal(pattern.row_indices.to(torch.int64), rows[by_column])


@settings(deadline=None, max_examples=30)
@given(masks(), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), st.booleans())
def test_compress_and_expand(any_device, mask, dtype, transposed):
    pattern = jacpot.Pattern(mask.to(any_device))
    weight = torch.randn(mask.shape).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    values = pattern.compress(weight.to(any_device))
    kept = oracle.compress(weight, mask)
    assert torch.equal(values.cpu(), kept)
    assert torch.equal(pattern.expand(values).cpu(), oracle.expand(kept, mask))


def test_compress_and_expand_differentiate():
    mask = torch.rand(5, 7) < 0.4
    pattern = jacpot.Pattern(mask)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    for function, argument in ((pattern.compress, weight), (pattern.expand, values)):
        assert torch.autograd.gradcheck(function, (argument,))
        assert torch.autograd.gradgradcheck(function, (argument,))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_wide_indices_and_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((3, 70_000), (70_000, 3)):
            mask = torch.rand(shape) < 0.1
            pattern = jacpot.Pattern(mask)
            assert torch.equal(pattern.mask(), mask)
            narrow = shape[1] <= 65536
            assert pattern.column_indices.dtype == (torch.uint16 if narrow else torch.int32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 0), (2, 2), (30, 50), (300, 5000), (5000, 300), (3, 70_000)])
def test_equal_masks_give_equal_patterns_whatever_the_memory_held(shape, monkeypatch):
    mask = torch.rand(shape) < 0.1
    patterns = []
    for filling in (0, 255):
        allocate = lambda size, filling=filling: torch.full((size,), filling, dtype=torch.uint8)  # noqa: E731
        monkeypatch.setattr("jacpot.ops.pattern._allocate", allocate)
        patterns.append(jacpot.Pattern(mask))
    assert patterns[0] == patterns[1]


def test_takes_numpy_and_strided_masks():
    mask = np.random.default_rng(0).random((12, 20)) < 0.3
    for view in (mask, mask.T, mask[::2, ::3]):
        expected = torch.from_numpy(np.ascontiguousarray(view))
        assert torch.equal(jacpot.Pattern(view).mask(), expected)


def test_is_immutable_and_travels():
    pattern = jacpot.Pattern(torch.rand(9, 4) < 0.5)
    with pytest.raises(AttributeError, match="immutable"):
        pattern.nnz = 3
    buffer = io.BytesIO()
    torch.save(pattern.block, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        jacpot.Pattern.from_block(torch.load(buffer)),
        pattern.to("cpu"),
    ):
        assert other == pattern
        assert hash(other) == hash(pattern)
    assert pattern != jacpot.Pattern(~pattern.mask())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
def test_compress_and_expand_are_their_own_tangents():
    mask = torch.rand(6, 4) < 0.5
    pattern = jacpot.Pattern(mask)
    weight, values = torch.randn(6, 4).double(), torch.randn(pattern.nnz).double()
    for f, x in ((pattern.compress, weight), (pattern.expand, values)):
        tangent = torch.randn_like(x)
        assert torch.equal(torch.func.jvp(f, (x,), (tangent,))[1], f(tangent))
        jacobian = torch.func.jacrev(f)(x)
        assert torch.equal(torch.func.jacfwd(f)(x), jacobian)
        assert torch.equal(jacobian.flatten(f(x).dim()) @ x.flatten(), f(x))
        expected = torch.stack([f(x), f(2 * x)])
        assert torch.equal(torch.vmap(f)(torch.stack([x, 2 * x])), expected)
        assert torch.autograd.gradcheck(f, (x.requires_grad_(),), check_forward_ad=True)
        twice = torch.func.hessian(lambda x, f=f: f(x).pow(3).sum())(x.detach())
        assert torch.equal(
            twice,
            torch.func.jacfwd(torch.func.jacfwd(lambda x, f=f: f(x).pow(3).sum()))(x.detach()),
        )
        assert twice.any()


def test_refusals():
    with pytest.raises(TypeError, match="'mask' must be bool, got float32"):
        jacpot.Pattern(torch.ones(2, 2))
    with pytest.raises(TypeError, match="'mask' must be a NumPy, PyTorch or CuPy array, got list"):
        jacpot.Pattern([[True]])
    with pytest.raises(ValueError, match="'mask' must have 2 dimensions"):
        jacpot.Pattern(torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="'mask' must hold values, got a tensor on the meta"):
        jacpot.Pattern(torch.ones(2, 2, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="not a compiled pattern"):
        jacpot.Pattern.from_block(torch.zeros(300, dtype=torch.uint8))
    pattern = jacpot.Pattern(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"'weight' must have shape \(2, 3\), got \(3, 2\)"):
        pattern.compress(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"'values' must have shape \(6,\), got \(5,\)"):
        pattern.expand(torch.ones(5))
    with pytest.raises(TypeError, match="'values' must be bfloat16 or float32 or float64"):
        pattern.expand(torch.ones(6, dtype=torch.int64))


@pytest.mark.slow
def test_refuses_more_entries_than_31_bits():
    # A mask of stride 0: 2^31 entries without the memory.
    mask = torch.ones(1, 1, dtype=torch.bool).expand(65536, 32768)
    with pytest.raises(OverflowError, match="2\\^31"):
        jacpot.Pattern(mask)
