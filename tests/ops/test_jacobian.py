"""jacpot.ops.jacobian against the Jacobian formed in full."""

from __future__ import annotations

import dataclasses
import weakref
from functools import partial

import numpy
import pytest
import torch
from blocks import Kept, assert_close, moved, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot._backend import build_info, isa
from jacpot.ops import jacobian as ops
from jacpot.ops import jacobian_gram
from jacpot.reference import jacobian as reference

ISAS = build_info()["isas_supported"]


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@given(problem=problems())
@settings(deadline=None, max_examples=40)
def test_gram(device, outputs, problem):
    left, right, j_left, j_right, dtype, _ = problem
    left, right = moved(left, device), moved(right, device)
    symmetric = ops.gram(left, outputs=outputs)
    rectangular = ops.gram(left, right, outputs=outputs)
    assert_close(symmetric, reference.gram(j_left, j_left, outputs), dtype)
    assert_close(rectangular, reference.gram(j_left, j_right, outputs), dtype)
    swapped = symmetric.permute(2, 3, 0, 1) if outputs == "full" else symmetric.transpose(0, 1)
    assert torch.equal(symmetric, swapped)


@given(problem=problems(), columns=st.sampled_from([None, 0, 1, 3, 9]))
@settings(deadline=None, max_examples=40)
def test_products(device, problem, columns):
    blocks, _, jacobian, _, dtype, generator = problem
    tail = () if columns is None else (columns,)
    v = torch.randn(jacobian.shape[2], *tail, generator=generator, dtype=torch.float64).to(dtype)
    u = torch.randn(*jacobian.shape[:2], *tail, generator=generator, dtype=torch.float64).to(dtype)
    blocks = moved(blocks, device)
    forward = ops.jvp(blocks, v.to(device).split([b.n_parameters for b in blocks]))
    backward = ops.vjp(blocks, u.to(device))
    assert_close(forward, reference.jvp(jacobian, v.double()), dtype)
    assert [tuple(g.shape) for g in backward] == [(b.n_parameters, *tail) for b in blocks]
    assert_close(torch.cat(backward), reference.vjp(jacobian, u.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [5, 16, 17, 40])
@pytest.mark.parametrize("o", [7, 16, 100])
def test_products_of_many_outputs(each_isa, k, o, dtype):
    torch.manual_seed(k)
    block = ops.Factors(torch.randn(3, 1, 1, 4, dtype=dtype), torch.randn(3, k, 1, 1, o).to(dtype))
    jacobian = reference.rows(block.activations.double(), block.signals.double())
    v, u = torch.randn(4 * o, dtype=dtype), torch.randn(3, k, dtype=dtype)
    assert_close(ops.jvp([block], [v]), reference.jvp(jacobian, v.double()), dtype)
    assert_close(ops.vjp([block], u)[0], reference.vjp(jacobian, u.double()), dtype)
    assert_close(ops.row_norms([block]), reference.row_norms(jacobian), dtype)
    assert_close(ops.column_norms([block]), reference.column_norms(jacobian), dtype)


@given(problem=problems())
@settings(deadline=None, max_examples=40)
def test_rows_and_norms(device, problem):
    blocks, _, jacobian, _, dtype, _ = problem
    blocks = moved(blocks, device)
    assert_close(ops.dense(blocks), jacobian, dtype)
    assert_close(ops.row_norms(blocks), reference.row_norms(jacobian), dtype)
    assert_close(ops.column_norms(blocks), reference.column_norms(jacobian), dtype)


def test_gram_of_many_examples_is_what_rows_give():
    """Sizes around and beyond the tiles of the kernels, ragged on every side."""
    generator = torch.Generator().manual_seed(0)
    for n, k, t, i, o in [
        (131, 3, 1, 70, 33),
        (70, 1, 1, 300, 5),
        (19, 2, 13, 20, 17),
        (3, 33, 1, 4, 9),
        (110, 18, 1, 5, 6),
        (125, 17, 1, 5, 6),  # a result that is written past the caches
    ]:
        a = torch.randn(n, t, 1, i, generator=generator, dtype=torch.float64)
        s = torch.randn(n, k, t, 1, o, generator=generator, dtype=torch.float64)
        jacobian = reference.rows(a, s, bias=True)
        for outputs in ("full", "trace", "diagonal"):
            expected = reference.gram(jacobian, jacobian, outputs)
            for name in ISAS:
                with isa(name):
                    actual = ops.gram([ops.Factors(a, s, bias=True)], outputs=outputs)
                assert_close(actual, expected, torch.float64)
                if outputs == "full":
                    assert torch.equal(actual, actual.permute(2, 3, 0, 1))


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 16])
def test_gram_of_few_examples_of_many_positions(each_isa, n, outputs, monkeypatch):
    """There are few tiles, so that threads share the terms of their sums."""
    monkeypatch.setattr(jacobian_gram, "pairwise_is_cheaper", lambda *_: True)
    generator = torch.Generator().manual_seed(n)
    blocks, rows = [], []
    for t, i, o, density in [(70, 90, 40, 1.0), (1, 500, 60, 1.0), (50, 40, 30, 0.4)]:
        a = torch.randn(n, t, 1, i, generator=generator, dtype=torch.float64)
        s = torch.randn(n, 3, t, 1, o, generator=generator, dtype=torch.float64)
        mask = torch.rand(o, i, generator=generator) < density
        blocks.append(ops.Factors(a, s, None if density == 1.0 else Kept(mask), bias=True))
        rows.append(reference.rows(a, s, mask, bias=True))
    jacobian = torch.cat(rows, dim=2)
    expected = reference.gram(jacobian, jacobian, outputs)
    symmetric = ops.gram(blocks, outputs=outputs)
    assert_close(symmetric, expected, torch.float64)
    assert_close(ops.gram(blocks, blocks, outputs=outputs), expected, torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.gram(blocks, outputs=outputs), symmetric)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_gram_of_masked_layers_with_dead_units(each_isa, outputs):
    """As ReLUs make them: units without a signal for some examples, or for any."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(70, 1, 1, 30, generator=generator, dtype=torch.float64)
    s = torch.randn(70, 10, 1, 1, 90, generator=generator, dtype=torch.float64)
    s *= torch.rand(70, 1, 1, 1, 90, generator=generator) < 0.5
    s[..., 7] = 0
    mask = torch.rand(90, 30, generator=generator) < 0.2
    mask[11] = False
    for bias in (False, True):
        jacobian = reference.rows(a, s, mask, bias)
        actual = ops.gram([ops.Factors(a, s, Kept(mask), bias)], outputs=outputs)
        assert_close(actual, reference.gram(jacobian, jacobian, outputs), torch.float64)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_prepared_gram_holds_no_factors(outputs):
    torch.manual_seed(0)
    mask = torch.rand(4, 5) < 0.5
    blocks = [
        ops.Factors(torch.randn(9, 1, 1, 5), torch.randn(9, 2, 1, 1, 4), kept, bias=True)
        for kept in (None, Kept(mask))
    ]
    expected = ops.gram(blocks, outputs=outputs)
    factors = [weakref.ref(f) for b in blocks for f in (b.activations, b.signals)]
    finish = jacobian_gram.prepared(blocks, outputs=outputs)
    del blocks
    assert not any(f() is not None for f in factors)
    assert torch.equal(finish(), expected)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_both_ways_with_positions(outputs, monkeypatch):
    """Pairs of positions and generated rows are chosen by cost alone."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(21, 7, 2, 19, generator=generator, dtype=torch.float64)
    s = torch.randn(21, 3, 7, 2, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(22, 19, generator=generator) < 0.5
    for kept in (None, mask):
        pattern = None if kept is None else Kept(kept)
        expected = reference.rows(a, s, kept, bias=True)
        expected = reference.gram(expected, expected, outputs)
        for pairwise in (True, False):
            monkeypatch.setattr(jacobian_gram, "pairwise_is_cheaper", lambda *_, way=pairwise: way)
            actual = ops.gram([ops.Factors(a, s, pattern, bias=True)], outputs=outputs)
            assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("isa_name", ISAS)
def test_products_of_signals_with_positions_innermost(isa_name, masked):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 19, 2, 7, generator=generator, dtype=torch.float64)
    s = torch.randn(5, 3, 2, 11, 19, generator=generator, dtype=torch.float64)
    s = s.permute(0, 1, 4, 2, 3)
    mask = torch.rand(22, 7, generator=generator) < 0.5 if masked else None
    block = ops.Factors(a, s, None if mask is None else Kept(mask), bias=True)
    assert block.operands[1] is block.signals  # as they are
    full = reference.rows(a, s, mask, True)
    v = torch.randn(full.shape[2], 2, generator=generator, dtype=torch.float64)
    u = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    with isa(isa_name):
        assert_close(ops.jvp([block], [v]), reference.jvp(full, v), torch.float64)
        assert_close(ops.vjp([block], u)[0], reference.vjp(full, u), torch.float64)


def test_rows_of_signals_with_positions_innermost():
    """As a convolution's backward pass leaves them: (N, K, G, O, T) in memory."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 37, 2, 53, generator=generator)
    s = torch.randn(3, 2, 2, 21, 37, generator=generator).movedim(4, 2)
    block = ops.Factors(a, s, bias=True)
    expected = reference.rows(a.double(), s.double(), bias=True)
    for name in ISAS:
        with isa(name):
            assert_close(ops.dense([block]), expected, torch.float32)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_panels_of_unequal_numbers_of_examples_hold_the_same_columns(outputs, monkeypatch):
    monkeypatch.setattr(jacobian_gram, "pairwise_is_cheaper", lambda *_: False)
    monkeypatch.setattr(
        jacobian_gram, "row_panels", partial(jacobian_gram.row_panels, budget=1 << 10)
    )
    sides = [
        ops.Factors(torch.randn(n, 7, 2, 5), torch.randn(n, 3, 7, 2, 9), bias=True) for n in (4, 3)
    ]
    left, right = (
        reference.rows(s.activations.double(), s.signals.double(), None, True) for s in sides
    )
    expected = reference.gram(left, right, outputs)
    assert_close(ops.gram(sides[:1], sides[1:], outputs), expected, torch.float32)


def test_cost_model_prefers_pairs_for_few_positions_and_rows_for_many():
    few = ops.Factors(torch.ones(32, 4, 1, 256), torch.ones(32, 10, 4, 1, 256))
    many = ops.Factors(torch.ones(32, 400, 1, 27), torch.ones(32, 10, 400, 1, 16))
    assert jacobian_gram.pairwise_is_cheaper(few, few, "trace", True)
    assert not jacobian_gram.pairwise_is_cheaper(many, many, "trace", True)


def test_gram_writes_into_out():
    block = ops.Rows(torch.randn(4, 2, 5))
    out = torch.full((4, 2, 4, 2), torch.nan)
    assert ops.gram([block], out=out) is out
    assert torch.equal(out, ops.gram([block]))


def test_numpy_comes_back_as_numpy():
    a, s = numpy.ones((3, 1, 1, 2), "float32"), numpy.ones((3, 2, 1, 1, 4), "float32")
    blocks = [ops.Factors(a, s)]
    assert isinstance(ops.gram(blocks), numpy.ndarray)
    assert isinstance(ops.jvp(blocks, [numpy.ones(8, "float32")]), numpy.ndarray)
    assert isinstance(ops.vjp(blocks, numpy.ones((3, 2), "float32"))[0], numpy.ndarray)
    assert isinstance(ops.dense(blocks), numpy.ndarray)


def test_refusals_name_the_argument():
    a, s = torch.ones(3, 1, 1, 2), torch.ones(3, 2, 1, 1, 4)
    block = ops.Factors(a, s)
    with pytest.raises(TypeError, match=r"'activations' must be float32 or float64, got"):
        ops.Factors(a.long(), s)
    with pytest.raises(TypeError, match=r"'signals' must be torch.float32 like 'activations'"):
        ops.Factors(a, s.double())
    with pytest.raises(ValueError, match=r"'signals' must have shape \(3, K, 1, 1, O\)"):
        ops.Factors(a, s[:2])
    with pytest.raises(ValueError, match=r"'pattern' must have shape \(4, 2\), got \(2, 4\)"):
        ops.Factors(a, s, pattern=Kept(torch.ones(2, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="'blocks' must hold at least one block"):
        ops.dense([])
    with pytest.raises(ValueError, match=r"'blocks\[1\]' must have 3 examples"):
        ops.dense([block, ops.Rows(torch.ones(4, 2, 1))])
    with pytest.raises(
        ValueError, match=r"'vectors\[0\]' must have shape \(8,\) or \(8, R\), got \(7,\)"
    ):
        ops.jvp([block], [torch.ones(7)])
    with pytest.raises(TypeError, match=r"'vectors\[0\]' must be torch.float32"):
        ops.jvp([block], [torch.ones(8).double()])
    with pytest.raises(ValueError, match=r"'u' must have shape \(3, 2\)"):
        ops.vjp([block], torch.ones(2, 3))
    with pytest.raises(
        ValueError, match="'outputs' must be 'full', 'trace' or 'diagonal', got 'sum'"
    ):
        ops.gram([block], outputs="sum")
    with pytest.raises(ValueError, match="'right' must have 2 outputs like 'left', got 1"):
        ops.gram([block], [ops.Factors(a, s[:, :1])])
    with pytest.raises(ValueError, match=r"'out' must be contiguous of shape \(3, 3\)"):
        ops.gram([block], outputs="trace", out=torch.ones(3, 2))


def test_products_of_long_rows_do_not_stagnate():
    """One running sum in float32 would lose a part of what is small against it."""
    torch.manual_seed(3)
    rows = torch.rand(64, 1, 300_000)
    large = ops.Rows(1e4 * torch.rand(64, 1, 1))
    exact = sum(ops.gram([ops.Rows(b.rows.double())]) for b in (ops.Rows(rows), large))
    for right in (None, [large, ops.Rows(rows)]):
        found = ops.gram([large, ops.Rows(rows)], right)
        assert ((found - exact).abs() <= 1.5e-6 * exact).all()


def test_gram_refuses_other_weights_of_the_same_number():
    mask = torch.tensor([[True, False], [False, True]])
    a, s = torch.ones(3, 1, 1, 2), torch.ones(3, 1, 1, 1, 2)
    left, right = (ops.Factors(a, s, Kept(m)) for m in (mask, ~mask))
    with pytest.raises(ValueError, match="'right' must hold the same weights as 'left'"):
        ops.gram([left], [right])
    again = ops.Factors(a, s, Kept(mask.clone()))
    assert torch.equal(ops.gram([left], [again]), ops.gram([left]))


def test_lookup_refusals():
    tokens, signals = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1, 3, 4)
    with pytest.raises(TypeError, match="argument 'tokens' must be int64"):
        ops.Lookup(tokens.int(), signals, 5)
    with pytest.raises(TypeError, match="argument 'signals' must be float32 or float64"):
        ops.Lookup(tokens, signals.half(), 5)
    with pytest.raises(ValueError, match="argument 'tokens' must have 2 dimensions"):
        ops.Lookup(tokens[0], signals, 5)
    with pytest.raises(ValueError, match="argument 'signals' must have shape"):
        ops.Lookup(tokens, signals[:, :, :2], 5)


@pytest.mark.parametrize("empty", ["n", "k", "t", "g", "o", "i"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_of_one_kind(empty, masked, bias, device):
    size = {"n": 3, "k": 2, "t": 4, "g": 2, "o": 3, "i": 5} | {empty: 0}
    n, k, t, g, o, i = size.values()
    # Every second element: also what is empty has strides.
    a = torch.randn(n, t, g, 2 * i, dtype=torch.float64)[..., ::2]
    s = torch.randn(n, k, t, g, 2 * o, dtype=torch.float64)[..., ::2]
    mask = torch.rand(g * o, i) < 0.5 if masked else None
    (block,) = moved([ops.Factors(a, s, Kept(mask) if masked else None, bias)], device)
    rows = reference.rows(a, s, mask, bias)
    p = rows.shape[2]
    assert_close(ops.dense([block]), rows, torch.float64)
    v, u = torch.randn(p, 3, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    assert_close(ops.jvp([block], [v.to(device)]), rows @ v, torch.float64)
    (pulled,) = ops.vjp([block], u.to(device))
    assert_close(pulled, torch.einsum("nkp,nk->p", rows, u), torch.float64)
    other = torch.randn(5, *a.shape[1:], dtype=torch.float64)
    right = ops.Factors(other, torch.randn(5, *s.shape[1:], dtype=torch.float64), block.pattern)
    right = dataclasses.replace(right, bias=bias)
    rows_right = reference.rows(right.activations, right.signals, mask, bias)
    right = moved([right], device)
    for outputs, equation in {
        "full": "nkp,mlp->nkml",
        "trace": "nkp,mkp->nm",
        "diagonal": "nkp,mkp->nmk",
    }.items():
        found = ops.gram([block], outputs=outputs)
        assert_close(found, torch.einsum(equation, rows, rows), torch.float64)
        found = ops.gram([block], right, outputs=outputs)
        assert_close(found, torch.einsum(equation, rows, rows_right), torch.float64)
    assert_close(ops.row_norms([block]), rows.norm(dim=2), torch.float64)
    assert_close(ops.column_norms([block]), rows.norm(dim=(0, 1)), torch.float64)
    assert ops.sketch([block], 4).shape == (n, k, 4)
