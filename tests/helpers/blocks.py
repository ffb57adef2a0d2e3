"""Random Jacobians given as blocks, and formed in full."""

from __future__ import annotations

import dataclasses

import numpy
import torch
from hypothesis import strategies as st

from jacpot.ops import jacobian as ops
from jacpot.reference import jacobian as reference

# Sums of at most a few thousand terms of order one. A GPU sums longer runs one after another.
TOLERANCE = {"cpu": {torch.float64: 1e-12, torch.float32: 2e-5}}
TOLERANCE["cuda"] = {torch.float64: 4e-12, torch.float32: 1e-4}


class Kept:
    """The kept weights of a mask, as a pattern gives them."""

    def __init__(self, mask: torch.Tensor):
        self.shape = tuple(mask.shape)
        self.nnz = int(mask.sum())
        self.row_offsets = numpy.concatenate([[0], mask.sum(1).cumsum(0).numpy()])
        self.column_indices = mask.nonzero()[:, 1].to(torch.int32).numpy()


@st.composite
def problems(draw, max_examples: int = 9):
    """Blocks for two sets of examples, and their Jacobians formed in full."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    n = [draw(st.integers(0, max_examples)), draw(st.integers(0, max_examples))]
    k = draw(st.integers(0, 4))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sides: list[list] = [[], []]
    full: list[list] = [[], []]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["factors", "constant", "lookup", "rows"]))
        if kind == "rows":
            p = draw(st.integers(0, 6))
            for side in (0, 1):
                rows = normal(n[side], k, p)
                sides[side].append(ops.Rows(rows.to(dtype)))
                full[side].append(rows)
            continue
        t = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 8, 20]))
        if kind == "lookup":
            v, d = draw(st.integers(1, 30)), draw(st.integers(0, 5))
            for side in (0, 1):
                tokens = torch.randint(v, (n[side], t), generator=generator)
                s = normal(n[side], k, t, d).to(dtype)
                sides[side].append(ops.Lookup(tokens, s, v))
                hot = torch.nn.functional.one_hot(tokens, v).double()
                full[side].append(torch.einsum("ntv,nktd->nkvd", hot, s.double()).flatten(2))
            continue
        g = draw(st.sampled_from([0, 1, 1, 2]))
        i, o = draw(st.integers(0, 12)), draw(st.integers(0, 9))
        mask = torch.rand(g * o, i, generator=generator) < 0.4 if draw(st.booleans()) else None
        bias = draw(st.booleans())
        strided = draw(st.booleans())
        constant = normal(1, k, t, g, o)
        for side in (0, 1):
            a = normal(n[side], t, g, i)
            s = normal(n[side], k, t, g, o)
            if kind == "constant":
                s = constant.expand_as(s)
            if strided:  # the same numbers, laid out from behind
                a = a.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
                s = s.permute(4, 3, 1, 2, 0).contiguous().permute(4, 2, 3, 1, 0)
            a, s = a.to(dtype), s.to(dtype)
            pattern = None if mask is None else Kept(mask)
            sides[side].append(ops.Factors(a, s, pattern=pattern, bias=bias))
            full[side].append(reference.rows(a.double(), s.double(), mask, bias))
    return sides[0], sides[1], torch.cat(full[0], 2), torch.cat(full[1], 2), dtype, generator


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    scale = 1 + (expected.abs().max() if expected.numel() else 0)
    tolerance = TOLERANCE[actual.device.type][dtype] * scale
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=float(tolerance))


def moved(blocks, device):
    """Give blocks on a device."""
    if device.type == "cpu":
        return blocks
    return [
        dataclasses.replace(b, rows=b.rows.to(device))
        if isinstance(b, ops.Rows)
        else dataclasses.replace(b, tokens=b.tokens.to(device), signals=b.signals.to(device))
        if isinstance(b, ops.Lookup)
        else dataclasses.replace(
            b, activations=b.activations.to(device), signals=b.signals.to(device)
        )
        for b in blocks
    ]
