"""The CUDA kernels of the Jacobian, their logic run on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacpot
from jacpot import _backend
from jacpot.ops import jacobian as ops
from jacpot.ops import jacobian_cuda as cuda
from jacpot.reference import jacobian as oracle

BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture
def kernels(emulated_cuda):
    emulated_cuda.configure(shared_bytes=164 * 1024)
    return emulated_cuda


def factors(n, k, t, g, o, i, dtype, seed, density=None):
    """Draw both factors, and a mask of the weight or None."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, t, g, i, generator=generator, dtype=dtype)
    s = torch.randn(n, k, t, g, o, generator=generator, dtype=dtype)
    mask = None
    if density is not None:
        mask = torch.rand(g * o, i, generator=generator) < density
    return a, s, mask


def layout(mask):
    if mask is None:
        return None, None
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return offsets, mask.nonzero()[:, 1].to(torch.int32)


def rows_of(layers, bias):
    return torch.cat([oracle.rows(a.double(), s.double(), m, bias) for a, s, m in layers], 2)


def close(got, expected, dtype):
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=BOUND[dtype] * scale)


@st.composite
def problems(draw, outputs):
    """A few layers of the same examples and outputs."""
    k = draw(st.sampled_from([1, 2, 3, 5, 10, 70, 130] if outputs == "full" else [1, 2, 3]))
    n, m = draw(st.integers(1, 150 // k + 2)), draw(st.integers(1, 150 // k + 2))
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        t, g = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        o, i = draw(st.integers(1, 6)), draw(st.integers(1, 20))
        layers.append((t, g, o, i, draw(st.sampled_from([None, 0.0, 0.3, 1.0]))))
    return n, m, k, layers


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=5)
@given(data=st.data(), symmetric=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_gram(kernels, dtype, outputs, data, symmetric, bias, seed):
    n, m, k, shapes = data.draw(problems(outputs))
    if symmetric:
        m = n
    left, right, layers = [], [], []
    for index, (t, g, o, i, density) in enumerate(shapes):
        a, s, mask = factors(n, k, t, g, o, i, dtype, seed + index, density)
        b, d, _ = factors(m, k, t, g, o, i, dtype, seed + index + 50)
        left.append((a, s, mask))
        right.append((a, s, mask) if symmetric else (b, d, mask))
        layers.append(((a, s), None if symmetric else (b, d), *layout(mask), bias))
    shape = {"full": (n, k, m, k), "trace": (n, m), "diagonal": (n, m, k)}[outputs]
    out = torch.full(shape, torch.nan, dtype=dtype)
    cuda.jacobian_gram(layers, outputs, out, 1)
    close(out, oracle.gram(rows_of(left, bias), rows_of(right, bias), outputs), dtype)
    if symmetric:
        mirrored = out.permute(2, 3, 0, 1) if outputs == "full" else out.transpose(0, 1)
        assert torch.equal(out, mirrored)


def size_of_rows(layers, bias):
    """What the error on tensor cores is measured by: rows' norms, if each layer has one position.

    (N, K); a layer of several positions counts as the sum of its positions' norms.
    """
    total = 0
    for a, s, _ in layers:
        norms = (a.double().square().sum(3)[:, None] + bias) * s.double().square().sum(4)
        total = total + norms.sqrt().sum(2).square().sum(2)
    return total.sqrt()


@pytest.mark.parametrize("precision", ["tf32", "3xtf32"])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@settings(max_examples=4)
@given(data=st.data(), symmetric=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_gram_on_tensor_cores(kernels, outputs, precision, data, symmetric, bias, seed):
    n, m, k, shapes = data.draw(problems(outputs))
    m = n if symmetric else m
    left, right, layers = [], [], []
    for index, (t, g, o, i, density) in enumerate(shapes):
        a, s, mask = factors(n, k, t, g, o, i, torch.float32, seed + index, density)
        b, d, _ = factors(m, k, t, g, o, i, torch.float32, seed + index + 50)
        left.append((a, s, mask))
        right.append((a, s, mask) if symmetric else (b, d, mask))
        layers.append(((a, s), None if symmetric else (b, d), *layout(mask), bias))
    shape = {"full": (n, k, m, k), "trace": (n, m), "diagonal": (n, m, k)}[outputs]
    out = torch.full(shape, torch.nan)
    cuda.jacobian_gram(layers, outputs, out, 1, precision)
    expected = oracle.gram(rows_of(left, bias), rows_of(right, bias), outputs)
    x, y = size_of_rows(left, bias), size_of_rows(right, bias)
    letters = {"full": "nk,ml->nkml", "trace": "nk,mk->nm", "diagonal": "nk,mk->nmk"}[outputs]
    # The sums here are of at most 20 inputs, 6 units and a few layers, groups and positions.
    bound = {"tf32": 2**-9, "3xtf32": 2**-19}[precision] + 2**-20
    excess = (out.double() - expected).abs() - bound * torch.einsum(letters, x, y)
    assert excess.max() <= 0, float(excess.max())
    if symmetric:
        mirrored = out.permute(2, 3, 0, 1) if outputs == "full" else out.transpose(0, 1)
        assert torch.equal(out, mirrored)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("tf32", 1e-5, 2**-9), ("3xtf32", 0, 4e-6)]
)
def test_precision_of_long_sums(kernels, precision, least, most):
    """More than one chunk of the inner index, whole 16-byte accesses; rounding does happen."""
    a, s, _ = factors(13, 2, 1, 1, 72, 100, torch.float32, 3)
    blocks = [ops.Factors(a, s, bias=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "on_cuda", lambda tensor: False)
        exact = ops.gram([ops.Factors(a.double(), s.double(), bias=True)])
    norms = exact.reshape(26, 26).diagonal().sqrt()
    got = ops.gram(blocks, precision=precision)
    error = (got.double() - exact).abs().reshape(26, 26) / norms / norms[:, None]
    assert least <= error.max() <= most
    assert torch.equal(got, got.permute(2, 3, 0, 1))
    assert ops.gram(blocks).sub(exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("tf32", 1e-5, 2**-9), ("3xtf32", 0, 1e-5)]
)
def test_precision_on_a_gpu(real_gpu, precision, least, most):
    a, s, _ = factors(130, 3, 1, 1, 300, 500, torch.float32, 3)
    exact = ops.gram([ops.Factors(a.double(), s.double(), bias=True)])
    norms = exact.reshape(390, 390).diagonal().sqrt()
    got = ops.gram([ops.Factors(a.to(real_gpu), s.to(real_gpu), bias=True)], precision=precision)
    error = (got.cpu().double() - exact).abs().reshape(390, 390) / norms / norms[:, None]
    assert least <= error.max() <= most


def test_float64_is_exact_at_any_precision(kernels):
    a, s, _ = factors(5, 2, 1, 1, 3, 4, torch.float64, 0)
    blocks = [ops.Factors(a, s)]
    assert torch.equal(ops.gram(blocks, precision="tf32"), ops.gram(blocks))
    with pytest.raises(ValueError, match="'exact', '3xtf32' or 'tf32', got 'half'"):
        ops.gram(blocks, precision="half")


def test_gram_of_more_layers_than_one_launch_takes(kernels):
    layers = [factors(5, 2, 1, 1, 3, 4, torch.float64, seed) for seed in range(30)]
    out = torch.empty(5, 2, 5, 2, dtype=torch.float64)
    cuda.jacobian_gram([((a, s), None, None, None, True) for a, s, _ in layers], "full", out, 1)
    rows = rows_of(layers, True)
    close(out, oracle.gram(rows, rows, "full"), torch.float64)


def test_gram_of_expanded_signals(kernels):
    """Signals that are the same for all examples come as a view that repeats one."""
    a, s, _ = factors(6, 3, 1, 1, 4, 5, torch.float64, 1)
    s = s[:1].expand(6, -1, -1, -1, -1)
    out = torch.empty(6, 3, 6, 3, dtype=torch.float64)
    cuda.jacobian_gram([((a, s), None, None, None, False)], "full", out, 1)
    rows = oracle.rows(a, s)
    close(out, oracle.gram(rows, rows, "full"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 2, *[st.integers(1, 9)] * 2),
    density=st.sampled_from([None, 0.0, 0.1, 0.3, 1.0]),
    bias=st.booleans(),
    r=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_products(kernels, dtype, sizes, density, bias, r, seed):
    n, k, *_ = sizes
    a, s, mask = factors(*sizes, dtype, seed, density)
    jacobian = rows_of([(a, s, mask)], bias)
    p = jacobian.shape[2]
    v, u = torch.randn(r, p, dtype=dtype), torch.randn(n, k, r, dtype=dtype)
    out = torch.ones(n, k, r, dtype=dtype)
    cuda.jacobian_jvp((a, s), *layout(mask), bias, False, v, out, 1)
    close(out, 1 + oracle.jvp(jacobian, v.T.double()), dtype)
    back = torch.full((r, p), torch.nan, dtype=dtype)
    cuda.jacobian_vjp((a, s), *layout(mask), bias, False, u, back, 1)
    close(back.T, oracle.vjp(jacobian, u.double()), dtype)
    squares = rows_of([(a.square(), s.square(), mask)], bias)
    cuda.jacobian_jvp((a.square(), s), *layout(mask), bias, True, v, out.zero_(), 1)
    close(out, oracle.jvp(squares, v.T.double()), dtype)


def test_products_in_parts(kernels, monkeypatch):
    monkeypatch.setattr(cuda, "PANEL_BYTES", 100)
    a, s, _ = factors(7, 2, 1, 1, 3, 4, torch.float64, 0)
    jacobian = oracle.rows(a, s)
    v, u = torch.randn(1, 12, dtype=torch.float64), torch.randn(7, 2, 1, dtype=torch.float64)
    out = torch.zeros(7, 2, 1, dtype=torch.float64)
    cuda.jacobian_jvp((a, s), None, None, False, False, v, out, 1)
    close(out, oracle.jvp(jacobian, v.T), torch.float64)
    back = torch.empty(1, 12, dtype=torch.float64)
    cuda.jacobian_vjp((a, s), None, None, False, False, u, back, 1)
    close(back.T, oracle.vjp(jacobian, u), torch.float64)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_are_written_in_place(kernels, groups, positions):
    a, s, _ = factors(4, 2, positions, groups, 3, 5, torch.float32, 0)
    out = torch.zeros(4, 2, groups * 15 + 4)
    cuda.jacobian_rows((a, s), out, 3, 1)
    close(out[:, :, 3:-1], oracle.rows(a.double(), s.double()), torch.float32)
    assert not out[:, :, :3].any()
    assert not out[:, :, -1].any()


@settings(max_examples=15)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 10**12),
    first=st.integers(0, 200),
    shape=st.tuples(st.integers(0, 150), st.integers(0, 400)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_signs_are_those_of_the_cpu(kernels, seed, offset, first, shape, dtype):
    got, expected = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    cuda.jacobian_signs(seed, offset, first, got, 1)
    _backend.core.jacobian_signs(seed, offset, first, expected, 1)
    assert torch.equal(got, expected)


@settings(max_examples=10)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 10**12),
    shape=st.tuples(st.integers(1, 20), st.integers(0, 40), st.integers(1, 100)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sparse_sketch_is_that_of_the_cpu(kernels, seed, offset, shape, dtype):
    m, p, dim = shape
    rows = torch.randn(m, p, dtype=dtype)
    got, expected = torch.ones(m, dim, dtype=dtype), torch.ones(m, dim, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "SKETCHED", 16)
        cuda.jacobian_sparse_sketch(rows, seed, offset, min(8, dim), got, 1)
    _backend.core.jacobian_sparse_sketch(rows, seed, offset, min(8, dim), expected, 1)
    close(got, expected.double(), dtype)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100])
def test_mirror(kernels, n):
    matrix = torch.randn(n, n)
    expected = matrix.triu() + matrix.triu(1).T
    cuda.jacobian_mirror(matrix, 1)
    assert torch.equal(matrix, expected)


def test_row_products(kernels):
    x, y = torch.randn(1100, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    out = torch.ones(1100, 5, dtype=torch.float64)
    cuda.jacobian_add_row_products(x, y, out, 1)
    close(out, 1 + x @ y.T, torch.float64)
    square = torch.ones(1100, 1100, dtype=torch.float64)
    cuda.jacobian_add_row_products(x, None, square, 1)
    close(square.triu(), (1 + x @ x.T).triu(), torch.float64)


@pytest.mark.parametrize("density", [None, 0.1, 0.5])
@pytest.mark.parametrize("positions", [1, 3])
def test_the_public_functions(kernels, density, positions):
    a, s, mask = factors(6, 3, positions, 1, 4, 7, torch.float64, 5, density)
    pattern = None if mask is None else jacpot.Pattern(mask)
    rows = torch.randn(6, 3, 2, dtype=torch.float64)
    blocks = [ops.Factors(a, s, pattern, bias=True), ops.Rows(rows)]
    jacobian = torch.cat([oracle.rows(a, s, mask, True), rows], 2)
    sizes = [b.n_parameters for b in blocks]
    v, u = torch.randn(sum(sizes), 2).double(), torch.randn(6, 3, 2).double()
    close(ops.dense(blocks), jacobian, a.dtype)
    close(ops.jvp(blocks, v.split(sizes)), oracle.jvp(jacobian, v), a.dtype)
    close(torch.cat(ops.vjp(blocks, u)), oracle.vjp(jacobian, u), a.dtype)
    close(ops.row_norms(blocks), oracle.row_norms(jacobian), a.dtype)
    close(ops.column_norms(blocks), oracle.column_norms(jacobian), a.dtype)
    for outputs in ("full", "trace", "diagonal"):
        expected = oracle.gram(jacobian, jacobian, outputs)
        close(ops.gram(blocks, outputs=outputs), expected, a.dtype)
        close(ops.gram(blocks, blocks, outputs=outputs), expected, a.dtype)
    for kind in ("rademacher", "sparse"):
        sketched = ops.sketch(blocks, 70, seed=3, kind=kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backend, "on_cuda", lambda tensor: False)
            close(sketched, ops.sketch(blocks, 70, seed=3, kind=kind), a.dtype)


def test_tensors_on_different_devices_are_refused():
    a, s, _ = factors(2, 1, 1, 1, 3, 4, torch.float32, 0)
    with pytest.raises(ValueError, match="must be on the CPU or a CUDA device, got meta"):
        ops.Factors(a, s.to("meta"))


def test_refusals(kernels):
    a, s, _ = factors(2, 1, 1, 1, 3, 4, torch.float32, 0)
    out = torch.empty(2, 2)
    with pytest.raises(TypeError, match="'activations' must be float32, got float64"):
        cuda.jacobian_gram([((a.double(), s.double()), None, None, None, False)], "trace", out, 1)
    strided = torch.stack([s, s], 5)[..., 0]
    with pytest.raises(ValueError, match="'signals' must have an innermost stride of 1"):
        cuda.jacobian_gram([((a, strided), None, None, None, False)], "trace", out, 1)
    with pytest.raises(ValueError, match=r"'out' must have shape \(2, 2\), got \(3, 2\)"):
        cuda.jacobian_gram([((a, s), None, None, None, False)], "trace", torch.empty(3, 2), 1)


MATMUL = torch.backends.cuda.matmul
new_way = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="PyTorch before 2.9")


@pytest.fixture
def told(request):
    """Tell PyTorch by one of its two ways to use TF32, and give what it was told."""
    before = torch.get_float32_matmul_precision()
    if request.param == "old way":
        torch.set_float32_matmul_precision("medium")
    else:
        MATMUL.fp32_precision = "tf32"
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["exact", "3xtf32", "tf32"])
@pytest.mark.parametrize("told", ["old way", pytest.param("new way", marks=new_way)], indirect=True)
def test_precision_of_rows(kernels, monkeypatch, told, precision):
    """Plain products follow what was asked for, whatever PyTorch was told, and leave that alone."""

    def state():  # to ask for the old way's after the new one was used is an error of PyTorch's
        return getattr(MATMUL, "fp32_precision", None) or MATMUL.allow_tf32

    before, asked = state(), []
    product = cuda.jacobian_add_row_products

    def record(*arguments):
        asked.append(state())
        product(*arguments)

    monkeypatch.setattr(cuda, "jacobian_add_row_products", record)
    ops.gram([ops.Rows(torch.randn(3, 2, 5))], precision=precision)
    assert state() == before
    if told == "old way":
        assert torch.get_float32_matmul_precision() == "medium"
    assert set(asked) <= ({"tf32", True} if precision == "tf32" else {"ieee", False})
    assert asked


def test_what_units_keep_is_found_once_for_a_pattern(kernels, monkeypatch):
    """That is what waits for the device: blocks of one pattern share it."""
    a, s, mask = factors(5, 2, 1, 1, 7, 11, torch.float64, 2, 0.4)
    pattern = jacpot.Pattern(mask)
    blocks = [ops.Factors(x[:n], d[:n], pattern) for n, x, d in ((5, a, s), (3, a, s))]
    assert blocks[0].row_offsets is blocks[1].row_offsets
    found = []

    def find(offsets, columns, inputs):
        found.append(plain(offsets, columns, inputs))
        return found[-1]

    plain = cuda._inputs_of_units
    monkeypatch.setattr(cuda, "_inputs_of_units", find)
    rows = rows_of([(a, s, mask)], False)
    close(ops.gram([blocks[0]]), oracle.gram(rows, rows, "full"), torch.float64)
    close(ops.gram([blocks[1]]), oracle.gram(rows[:3], rows[:3], "full"), torch.float64)
    assert found[0] is found[1]
    known = len(cuda._inputs)
    found.clear()
    del blocks, pattern
    gc.collect()
    assert len(cuda._inputs) < known


def test_masked_layers_are_added_in_panels_of_units(kernels, monkeypatch):
    monkeypatch.setattr(cuda, "PANEL_BYTES", 2000)
    a, s, mask = factors(5, 3, 2, 2, 7, 11, torch.float64, 2, 0.4)
    rows = rows_of([(a, s, mask)], True)
    for outputs in ("full", "trace", "diagonal"):
        shape = {"full": (5, 3, 5, 3), "trace": (5, 5), "diagonal": (5, 5, 3)}[outputs]
        out = torch.full(shape, torch.nan).double()
        cuda.jacobian_gram([((a, s), None, *layout(mask), True)], outputs, out, 1)
        close(out, oracle.gram(rows, rows, outputs), torch.float64)
