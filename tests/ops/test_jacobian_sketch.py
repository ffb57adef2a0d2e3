"""Random projections: of one seed the same matrix, however columns and examples are cut."""

from __future__ import annotations

import pytest
import torch
from blocks import Kept, assert_close, moved, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot.ops import jacobian as ops
from jacpot.ops import jacobian_sketch


@given(problem=problems(), dim=st.integers(1, 70), seed=st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None, max_examples=30)
def test_sketch_is_one_matrix_of_signs(any_device, problem, dim, seed):
    blocks, others, jacobian, j_others, dtype, _ = problem
    p = jacobian.shape[2]
    signs = ops.sketch([ops.Rows(torch.eye(p, dtype=torch.float64)[:, None])], dim, seed)[:, 0]
    torch.testing.assert_close(signs.abs(), torch.full_like(signs, dim**-0.5))
    blocks, others = moved(blocks, any_device), moved(others, any_device)
    assert_close(ops.sketch(blocks, dim, seed), jacobian @ signs, dtype)
    assert_close(ops.sketch(others, dim, seed), j_others @ signs, dtype)


@given(problem=problems(), dim=st.integers(1, 130), seed=st.integers(-(2**63), 2**63 - 1))
def test_sparse_sketch_is_one_matrix_of_few_signs(any_device, problem, dim, seed):
    blocks, others, jacobian, j_others, dtype, _ = problem
    p, entries = jacobian.shape[2], min(8, dim)
    identity = ops.Rows(torch.eye(p, dtype=torch.float64)[:, None])
    matrix = ops.sketch([identity], dim, seed, kind="sparse")[:, 0]
    assert (matrix.ne(0).sum(1) == entries).all()
    torch.testing.assert_close(matrix.abs().sum(1), torch.full((p,), entries**0.5).double())
    blocks, others = moved(blocks, any_device), moved(others, any_device)
    assert_close(ops.sketch(blocks, dim, seed, kind="sparse"), jacobian @ matrix, dtype)
    assert_close(ops.sketch(others, dim, seed, kind="sparse"), j_others @ matrix, dtype)


@pytest.mark.parametrize("kind", ["rademacher", "sparse"])
def test_sketch_keeps_norms(kind):
    rows = ops.Rows(torch.randn(20, 3, 500, generator=torch.Generator().manual_seed(0)))
    kept = ops.sketch([rows], 4096, seed=1, kind=kind).norm(dim=2) / ops.row_norms([rows])
    assert (kept - 1).abs().max() < 0.06  # about five standard deviations of 1/sqrt(2 dim)


@pytest.mark.parametrize("kind", ["rademacher", "sparse"])
@given(problem=problems(), dim=st.integers(1, 40), cut=st.integers(1, 8))
@settings(max_examples=15)
def test_sketch_does_not_depend_on_cuts(kind, problem, dim, cut):
    blocks, _, jacobian, _, dtype, _ = problem
    whole = ops.sketch(blocks, dim, 3, kind=kind)
    rows = ops.Rows(jacobian.to(dtype))
    assert_close(ops.sketch([rows], dim, 3, kind=kind), whole.double(), dtype)
    parts = [ops.sketch([ops.Rows(part)], dim, 3, kind=kind) for part in rows.rows.split(cut)]
    assert_close(torch.cat(parts), whole.double(), dtype)
    p = jacobian.shape[2]
    halves = [ops.Rows(rows.rows[:, :, p // 2 :]), ops.Rows(rows.rows[:, :, : p // 2])]
    turned = ops.sketch(halves, dim, 3, offsets=[p // 2, 0], kind=kind)
    assert_close(turned, whole.double(), dtype)


@pytest.mark.parametrize("kind", ["rademacher", "sparse"])
@pytest.mark.parametrize("panel", [1, 400, 1 << 20])
@pytest.mark.parametrize("masked", [False, True])
def test_sketch_takes_columns_in_any_order(kind, panel, masked, monkeypatch):
    monkeypatch.setattr(jacobian_sketch, "PANEL_BYTES", panel)
    torch.manual_seed(0)
    a, s = torch.randn(5, 3, 1, 4).double(), torch.randn(5, 2, 3, 1, 6).double()
    pattern = Kept(torch.rand(6, 4) < 0.5) if masked else None
    factors, rows = ops.Factors(a, s, pattern), ops.Rows(torch.randn(5, 2, 7).double())
    orders = [torch.randperm(factors.n_parameters), None, torch.randperm(7)]
    blocks = [factors, rows, rows]
    straight = [
        ops.Rows(ops.dense([b]) if o is None else ops.dense([b])[:, :, o.argsort()])
        for b, o in zip(blocks, orders, strict=True)
    ]
    expected = ops.sketch(straight, 20, 1, kind=kind)
    found = ops.sketch(blocks, 20, 1, kind=kind, orders=orders)
    torch.testing.assert_close(found, expected)


def test_sketch_refusals():
    block = ops.Rows(torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match="'dim' must be at least 1, got 0"):
        ops.sketch([block], 0)
    with pytest.raises(ValueError, match="'kind' must be 'rademacher' or 'sparse', got 'dense'"):
        ops.sketch([block], 2, kind="dense")
    with pytest.raises(ValueError, match="'offsets' must hold one entry per block, 1, got 2"):
        ops.sketch([block], 2, offsets=[0, 3])
    with pytest.raises(ValueError, match="'orders' must hold one entry per block, 1, got 0"):
        ops.sketch([block], 2, orders=[])
