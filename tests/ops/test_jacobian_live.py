"""Products with factors whose units are off in part, against the Jacobian formed in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacpot._backend import build_info, core, isa, threads
from jacpot.ops import jacobian as ops
from jacpot.ops.pattern import Pattern
from jacpot.reference import jacobian as reference

ISAS = build_info()["isas_supported"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@st.composite
def problems(draw):
    """Factors of which a part is off, in all the layouts that signals come in."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    n, k = draw(st.sampled_from([0, 1, 5, 63, 64, 65, 130])), draw(st.sampled_from([1, 3, 17]))
    t, g = draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([1, 1, 2]))
    i, o = draw(st.sampled_from([0, 1, 7, 16, 33, 150])), draw(st.sampled_from([0, 1, 5, 64, 67]))
    density = draw(st.sampled_from([None, None, 0.0, 0.1, 0.5, 1.0]))
    on = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    a = torch.randn(n, t, g, i, generator=generator, dtype=torch.float64).to(dtype)
    s = torch.randn(n, k, t, g, o, generator=generator, dtype=torch.float64).to(dtype)
    s *= torch.rand(n, 1, t, g, o, generator=generator) < on
    if draw(st.booleans()):  # positions innermost, as convolutions have them
        s = s.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    mask = None
    if density is not None:
        mask = torch.rand(g * o, i, generator=generator) < density
        mask[: draw(st.integers(0, 2))] = False  # units that see nothing
    pattern = None if mask is None else Pattern(mask)
    return ops.Factors(a, s, pattern=pattern, bias=draw(st.booleans())), mask, generator


def assert_close(actual, expected, dtype, terms):
    tolerance = TOLERANCE[dtype] * (1 + (expected.abs().max() if expected.numel() else 0))
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=float(tolerance) * (1 + terms**0.5)
    )


@given(problem=problems(), columns=st.sampled_from([0, 1, 3]), name=st.sampled_from(ISAS))
def test_products(problem, columns, name):
    factors, mask, generator = problem
    pair = (factors.activations, factors.signals)
    live = core.jacobian_live_factors(pair, *factors.layout, factors.bias, 1.0, threads())
    dtype, (n, k) = factors.dtype, factors.signals.shape[:2]
    rows = reference.rows(
        factors.activations.double(), factors.signals.double(), mask, factors.bias
    )
    v = torch.randn(columns, factors.n_parameters, generator=generator, dtype=torch.float64)
    u = torch.randn(n, k, columns, generator=generator, dtype=torch.float64)
    v, u = v.to(dtype), u.to(dtype)
    before = torch.randn(n, k, columns, generator=generator, dtype=torch.float64).to(dtype)
    forward, backward = before.clone(), torch.full_like(v, torch.nan)
    with isa(name):
        live.jvp(v, forward, threads())
        live.vjp(u, backward, threads())
    assert_close(forward, before.double() + rows @ v.T.double(), dtype, v.shape[1])
    expected = torch.einsum("nkp,nkr->rp", rows, u.double())
    assert_close(backward, expected, dtype, n * k * factors.n_positions)


def test_that_few_units_are_on_is_asked_for():
    a, s = torch.randn(100, 1, 1, 5), torch.randn(100, 3, 1, 1, 20)
    assert ops.Factors(a, s).live is None
    assert ops.Factors(a, s[..., :8]).live is not None
    s[..., :10] = 0
    live = ops.Factors(a, s).live
    assert s.nbytes // 2 < live.nbytes < s.nbytes
    assert ops.Factors(a[:10], s[:10]).live is None


def test_masked_layers_are_asked_for_only_where_units_are_off():
    pattern = Pattern(torch.ones(8, 5, dtype=torch.bool))
    a, s = torch.randn(100, 1, 1, 5), torch.randn(100, 3, 1, 1, 8)
    assert ops.Factors(a, s, pattern=pattern).live is None
    s[..., :4] = 0
    assert ops.Factors(a, s, pattern=pattern).live is not None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("masked", [False, True])
def test_signals_that_are_not_finite(each_isa, masked, value):
    pattern = Pattern(torch.ones(40, 6, dtype=torch.bool)) if masked else None
    a, s = torch.randn(100, 1, 1, 6), torch.randn(100, 3, 1, 1, 40)
    s[..., :20] = 0
    s[7, 1, 0, 0, 5] = value
    factors = ops.Factors(a, s, pattern=pattern)
    assert factors.live is not None
    forward = ops.jvp([factors], [torch.randn(240)])
    expected = torch.ones(100, 3, dtype=torch.bool)
    expected[7, 1] = False
    assert torch.equal(forward.isfinite(), expected)
    backward = ops.vjp([factors], torch.randn(100, 3))[0].view(40, 6)
    assert torch.equal(backward.isfinite().all(1), torch.arange(40) != 5)


def test_layers_of_another_type_are_refused():
    s = torch.zeros(100, 3, 1, 1, 8)
    live = ops.Factors(torch.randn(100, 1, 1, 5), s).live
    with pytest.raises(TypeError, match="one dtype"):
        live.jvp(torch.zeros(1, 40).double(), torch.zeros(100, 3, 1).double(), 1)
    with pytest.raises(ValueError, match="'v'"):
        live.jvp(torch.zeros(1, 41), torch.zeros(100, 3, 1), 1)
    with pytest.raises(ValueError, match="'out'"):
        live.vjp(torch.zeros(100, 3, 2), torch.zeros(1, 40), 1)
