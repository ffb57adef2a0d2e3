"""Gram matrices of signals with units that are zero, as behind a ReLU, against full Jacobians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot.ops.jacobian import Factors, gram
from jacpot.ops.pattern import Pattern
from jacpot.reference import jacobian as reference


def factors(
    generator: torch.Generator, n: int, k: int, t: int, o: int, share: float, dead: int
) -> Factors:
    """Give factors of which this share of units is active, and none in some examples."""
    a = torch.randn(n, t, 1, 3, generator=generator, dtype=torch.float64)
    s = torch.randn(n, k, t, 1, o, generator=generator, dtype=torch.float64)
    s *= torch.rand(n, 1, t, 1, o, generator=generator) < share
    s *= torch.rand(s.shape, generator=generator) < 0.8  # some that say nothing of their unit
    s[:dead] = 0
    s[:, :, :, :, :1] *= -1  # zeros of both signs
    return Factors(a, s, bias=True)


def cast(blocks: list[Factors], dtype: torch.dtype, pattern: Pattern | None) -> list[Factors]:
    return [
        Factors(b.activations.to(dtype), b.signals.to(dtype), pattern=pattern, bias=b.bias)
        for b in blocks
    ]


def full(blocks: list[Factors], mask: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([reference.rows(b.activations, b.signals, mask, b.bias) for b in blocks], 2)


# Examples of one panel and of several, units of one segment and of several.
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.sampled_from([1, 2, 9, 26, 53])] * 2),
    k=st.sampled_from([1, 2, 3, 5, 8, 10, 16, 17]),
    t=st.sampled_from([1, 1, 1, 2]),
    o=st.sampled_from([1, 7, 64, 140, 600]),
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=2),
    dead=st.sampled_from([0, 1, 9]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25)
def test_units_of_zero(each_isa, outputs, seed, sizes, k, t, o, shares, dead, masked, dtype):
    generator = torch.Generator().manual_seed(seed)
    n, m = sizes if t == 1 else (min(s, 9) for s in sizes)
    o = o if t == 1 else min(o, 40)
    mask = torch.rand(o, 3, generator=generator) < 0.5 if masked else None
    pattern = None if mask is None else Pattern(mask)
    left, right = (
        [factors(generator, count, k, t, o, share, dead) for share in shares] for count in (n, m)
    )
    rows, columns = cast(left, dtype, pattern), cast(right, dtype, pattern)
    # What is expected of the rounded factors, and the sizes of what is summed.
    j, j_right = (full(cast(b, torch.float64, None), mask) for b in (rows, columns))
    terms = o * (k if outputs == "trace" else 1) + 8  # that are summed one after the other
    tolerance = terms * torch.finfo(dtype).eps
    for other, j_other, actual in (
        (None, j, gram(rows, outputs=outputs)),
        (columns, j_right, gram(rows, columns, outputs=outputs)),
    ):
        error = (actual.double() - reference.gram(j, j_other, outputs)).abs()
        size = reference.gram(j.abs(), j_other.abs(), outputs)
        assert (error <= tolerance * size).all()
        if other is None:
            swapped = actual.permute(2, 3, 0, 1) if outputs == "full" else actual.transpose(0, 1)
            assert torch.equal(actual, swapped)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("masked", [False, True])
def test_zeros_times_what_is_not_finite(each_isa, masked, value):
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern(torch.ones(20, 3, dtype=torch.bool).tril(1)) if masked else None
    blocks = [factors(generator, n, 4, 1, 20, 0.5, 0) for n in (9, 7)]
    left, right = (cast([b], torch.float32, pattern) for b in blocks)
    left[0].signals[2, :, 0, 0, 5] = 0
    right[0].signals[3, 1, 0, 0, 5] = value
    finite = gram(left, right).isfinite()
    assert not finite[:, :, 3, 1].any()
    finite[:, :, 3, 1] = True
    assert finite.all()
    # Symmetric, in the columns and in the rows of the half that is computed.
    for example in (1, 6):
        some = cast([blocks[1]], torch.float32, pattern)
        some[0].signals[:, :, 0, 0, 5] = 0
        some[0].signals[example, 1, 0, 0, 5] = value
        finite = gram(some).isfinite()
        assert not finite[example, 1].any()
        assert not finite[:, :, example, 1].any()
