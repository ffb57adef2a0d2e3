"""The sparse product and its derivatives, on every instruction set, against the dense product."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from maps import assert_maps

import jacpot
from jacpot.reference import masked_matmul as oracle

DTYPES = [torch.float32, torch.float64]
# Bound on errors in units of the last place, times the root of the number of terms. A GPU sums
# longer runs one after another.
ROUNDINGS = {"cpu": 4, "cuda": 16}


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_mask(shape, density, seed, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    if ragged and mask.numel():
        mask[::3] = False
        mask[:, ::5] = False
        mask[shape[0] // 2] = True
    return mask


def strided(tensor, order):
    """Return the same matrix in another memory layout."""
    if order == "feature":
        return tensor.t().contiguous().t()
    if order == "padded":
        padded = tensor.new_zeros(tensor.shape[0], tensor.shape[1] + 3)
        padded[:, : tensor.shape[1]] = tensor
        return padded[:, : tensor.shape[1]]
    if order == "every other":
        return tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    return tensor


def assert_close(actual, a, b, c=None, *, terms):
    """`actual` is a @ b (+ c) to a few roundings of each of `terms` products."""
    wide = [None if t is None else t.double().to(actual.device) for t in (a, b, c)]
    expected = wide[0] @ wide[1]
    scale = wide[0].abs() @ wide[1].abs()
    if c is not None:
        expected, scale = expected + wide[2], scale + wide[2].abs()
    eps = ROUNDINGS[actual.device.type] * torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs()
    assert (error <= eps * max(terms, 1) ** 0.5 * scale + 1e-300).all(), error.max()


problems = st.fixed_dictionaries(
    {
        "examples": st.one_of(st.integers(0, 9), st.sampled_from([31, 64, 130])),
        # The long ones are cut into several tiles.
        "shape": st.tuples(
            st.one_of(st.integers(0, 40), st.just(600)), st.one_of(st.integers(0, 40), st.just(300))
        ),
        "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "ragged": st.booleans(),
        "order": st.sampled_from(["row", "feature", "padded", "every other"]),
        "layout": st.sampled_from(["row", "feature"]),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**31),
    }
)


@settings(deadline=None, max_examples=60)
@given(problem=problems, bias=st.booleans(), relu=st.booleans())
@example(
    problem={
        "examples": 130,
        "shape": (40, 300),
        "density": 0.1,
        "ragged": True,
        "order": "row",
        "layout": "row",
        "dtype": torch.float32,
        "seed": 0,
    },
    bias=True,
    relu=True,
)
def test_forward(device, problem, bias, relu):
    shape, dtype = problem["shape"], problem["dtype"]
    mask = draw_mask(shape, problem["density"], problem["seed"], problem["ragged"])
    pattern = jacpot.Pattern(mask.to(device))
    generator = torch.Generator().manual_seed(problem["seed"])
    x = torch.randn(problem["examples"], shape[1], dtype=dtype, generator=generator)
    values = torch.randn(pattern.nnz, dtype=dtype, generator=generator)
    b = torch.randn(shape[0], dtype=dtype, generator=generator).to(device) if bias else None
    x, values = x.to(device), values.to(device)
    y = jacpot.masked_matmul(
        strided(x, problem["order"]),
        values,
        pattern,
        b,
        relu=relu,
        layout=problem["layout"],
        method="sparse",
    )
    again = jacpot.masked_matmul(x, values, pattern, b, relu=relu, method="sparse")
    assert y.shape == (problem["examples"], shape[0])
    if problem["layout"] == "feature" and y.numel():
        assert y.t().is_contiguous()
    if device.type == "cpu":  # on a GPU dense weights take cuBLAS, and each layout its own way
        assert torch.equal(y, again)
    torch.testing.assert_close(y, again)
    mask = mask.to(device)
    weight = oracle.expand(values, mask)
    if relu:
        expected = oracle.masked_matmul(x.double(), values.double(), mask, b).relu()
        assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)
        assert (y >= 0).all()
    else:
        assert_close(y, x, weight.T, b, terms=shape[1])


@settings(deadline=None, max_examples=60)
@given(problem=problems, dy_order=st.sampled_from(["row", "feature"]))
def test_backward(device, problem, dy_order):
    shape, dtype, n = problem["shape"], problem["dtype"], problem["examples"]
    mask = draw_mask(shape, problem["density"], problem["seed"], problem["ragged"])
    pattern = jacpot.Pattern(mask.to(device))
    generator = torch.Generator().manual_seed(problem["seed"])
    x = torch.randn(n, shape[1], dtype=dtype, generator=generator)
    dy = torch.randn(n, shape[0], dtype=dtype, generator=generator)
    values = torch.randn(pattern.nnz, dtype=dtype, generator=generator)
    backward = torch.ops.jacpot.masked_matmul_backward
    mask, x, dy, values = (t.to(device) for t in (mask, x, dy, values))
    arguments = strided(dy, dy_order), strided(x, problem["order"]), values, pattern.block
    dx, d_values = backward(*arguments, True, True)
    dx_alone, nothing = backward(*arguments, True, False)
    assert nothing.numel() == 0
    nothing, d_values_alone = backward(*arguments, False, True)
    assert nothing.numel() == 0
    assert_close(dx, dy, oracle.expand(values, mask), terms=shape[0])
    full = pattern.expand(d_values)
    kept = mask.to(dtype)
    wide_scale = (dy.double().abs().T @ x.double().abs()) * kept
    error = (full.double() - (dy.double().T @ x.double()) * kept).abs()
    bound = ROUNDINGS[device.type] * torch.finfo(dtype).eps * max(n, 1) ** 0.5 * wide_scale
    assert (error <= bound + 1e-300).all()
    assert torch.allclose(dx, dx_alone, rtol=1e-4, atol=1e-4)
    assert torch.allclose(d_values, d_values_alone, rtol=1e-4, atol=1e-4)


def test_same_bits_every_time(device):
    mask = draw_mask((200, 300), 0.1, 0, ragged=True)
    pattern = jacpot.Pattern(mask.to(device))
    x, dy = torch.randn(300, 300).to(device), torch.randn(300, 200).to(device)
    values = torch.randn(pattern.nnz).to(device)
    results = []
    for count in (1, 2, 3, 4, 2, 4):
        with threads(count):
            y = jacpot.masked_matmul(x, values, pattern)
            dx, dv = torch.ops.jacpot.masked_matmul_backward(
                dy, x, values, pattern.block, True, True
            )
        results.append((y, dx, dv))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def small_problem(device="cpu", density=0.4):
    """A density of 0.1 takes the sparse kernels on a GPU, 0.4 the dense product."""
    torch.manual_seed(0)
    pattern = jacpot.Pattern((torch.rand(7, 5) < density).to(device))
    arguments = [torch.randn(*shape).double() for shape in ((3, 5), (pattern.nnz,), (7,))]
    return pattern, *(a.to(device).requires_grad_() for a in arguments)


@pytest.mark.parametrize("layout", ["row", "feature"])
@pytest.mark.parametrize("relu", [False, True])
def test_differentiates(relu, layout, any_device):
    pattern, x, values, bias = small_problem(any_device, density=0.15)

    def f(x, values, bias):
        return jacpot.masked_matmul(x, values, pattern, bias, relu=relu, layout=layout)

    assert torch.autograd.gradcheck(f, (x, values, bias))
    assert torch.autograd.gradgradcheck(f, (x, values, bias))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("relu", [False, True])
def test_forward_mode(relu, any_device):
    pattern, *arguments = small_problem(any_device)

    def f(x, values, bias):
        return jacpot.masked_matmul(x, values, pattern, bias, relu=relu, method="sparse")

    assert torch.autograd.gradcheck(f, tuple(arguments), check_forward_ad=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("method", ["sparse", "dense"])
@pytest.mark.parametrize("relu", [False, True])
def test_transforms_compose(method, relu, any_device):
    pattern, *arguments = small_problem(any_device)
    arguments = tuple(a.detach() for a in arguments)
    kept = pattern.mask().nonzero(as_tuple=True)

    def f(x, values, bias):
        return jacpot.masked_matmul(x, values, pattern, bias, relu=relu, method=method)

    def plain(x, values, bias):
        weight = values.new_zeros(pattern.shape).index_put(kept, values)
        y = torch.nn.functional.linear(x, weight, bias)
        return torch.relu(y) if relu else y

    which = (0, 1, 2)
    expected = torch.func.jacrev(plain, which)(*arguments)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(f, which)(*arguments), expected)
    vectorized = torch.autograd.functional.jacobian(f, arguments, vectorize=True)
    torch.testing.assert_close(vectorized, expected)

    def cubed(f):
        return lambda *a: f(*a).pow(3).sum()

    expected = torch.func.hessian(cubed(plain), which)(*arguments)
    modes = torch.func.jacfwd, torch.func.jacrev
    for outer in modes:
        for inner in modes:
            hessian = outer(inner(cubed(f), which), which)(*arguments)
            torch.testing.assert_close(hessian, expected)
    vectorized = torch.autograd.functional.hessian(cubed(f), arguments, vectorize=True)
    torch.testing.assert_close(vectorized, expected)


def test_vmap(any_device):
    pattern, *arguments = small_problem(any_device)
    x, values, bias = (a.detach() for a in arguments)

    def f(x, values, bias):
        return jacpot.masked_matmul(x, values, pattern, bias, method="sparse")

    assert_maps(f, x, values, bias)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_differentiates_one_argument_alone(wanted, any_device):
    pattern, *arguments = small_problem(any_device)
    arguments = [a.detach().requires_grad_(i == wanted) for i, a in enumerate(arguments)]
    assert torch.autograd.gradcheck(
        lambda x, v, b: jacpot.masked_matmul(x, v, pattern, b), tuple(arguments)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_are_well_formed(dtype, real_device):
    pattern, *arguments = small_problem(real_device)
    x, values, bias = (a.detach().to(dtype).requires_grad_() for a in arguments)
    ops = torch.ops.jacpot
    check = torch.library.opcheck
    check(ops.masked_matmul.default, (x, values, bias, pattern.block, 7, False, False))
    check(ops.masked_matmul.default, (x, values, None, pattern.block, 7, True, True))
    dy = torch.randn(3, 7, dtype=dtype).to(real_device).requires_grad_()
    for wants in ((True, True), (True, False), (False, True)):
        check(ops.masked_matmul_backward.default, (dy, x, values, pattern.block, *wants))
    weight = torch.randn(7, 5, dtype=dtype).to(real_device).requires_grad_()
    check(ops.compress.default, (weight, pattern.block, pattern.nnz))
    check(ops.expand.default, (values, pattern.block, 7, 5))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
def test_traces():
    torch.manual_seed(0)
    pattern = jacpot.Pattern(torch.rand(6, 8) < 0.5)
    values = torch.randn(pattern.nnz)
    layer = jacpot.nn.SparseLinear.from_linear(torch.nn.Linear(8, 6), pattern.mask())
    for function in (layer, lambda x: jacpot.masked_matmul(x, values, pattern)):
        traced, x = torch.jit.trace(function, torch.randn(3, 8)), torch.randn(3, 8)
        torch.testing.assert_close(traced(x), function(x))


def test_leading_dimensions_and_numpy():
    mask = draw_mask((6, 4), 0.5, 0)
    pattern = jacpot.Pattern(mask)
    x, values = torch.randn(2, 3, 4), torch.randn(pattern.nnz)
    expected = oracle.masked_matmul(x, values, mask)
    torch.testing.assert_close(jacpot.masked_matmul(x, values, pattern), expected)
    torch.testing.assert_close(jacpot.masked_matmul(x[0, 0], values, pattern), expected[0, 0])
    result = jacpot.masked_matmul(x.numpy(), values.numpy(), pattern)
    assert isinstance(result, np.ndarray)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["row", "feature"])
def test_bfloat16_sums_in_float32(layout):
    mask = draw_mask((20, 300), 0.3, 0)
    pattern = jacpot.Pattern(mask)
    x, values = torch.randn(5, 300).bfloat16(), torch.randn(pattern.nnz).bfloat16()
    x.requires_grad_()
    y = jacpot.masked_matmul(x, values, pattern, layout=layout)
    exact = oracle.masked_matmul(x.detach().double(), values.double(), mask)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16()) or (y - exact).abs().max() < 2**-8 * exact.max()
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_refusals():
    pattern = jacpot.Pattern(torch.ones(2, 3, dtype=torch.bool))
    x, values = torch.ones(4, 3), torch.ones(6)
    with pytest.raises(ValueError, match=r"'x' must have shape \(..., 3\)"):
        jacpot.masked_matmul(torch.ones(4, 2), values, pattern)
    with pytest.raises(ValueError, match=r"'values' must have shape \(6,\), got \(5,\)"):
        jacpot.masked_matmul(x, torch.ones(5), pattern)
    with pytest.raises(ValueError, match=r"'bias' must have shape \(2,\), got \(3,\)"):
        jacpot.masked_matmul(x, values, pattern, torch.ones(3))
    with pytest.raises(ValueError, match="'layout' must be 'row' or 'feature', got 'column'"):
        jacpot.masked_matmul(x, values, pattern, layout="column")
    with pytest.raises(TypeError, match="'values' must be float32 like 'x', got float64"):
        jacpot.masked_matmul(x, values.double(), pattern)
    with pytest.raises(TypeError, match="'x' must be bfloat16, float32 or float64, got int64"):
        jacpot.masked_matmul(x.long(), values.long(), pattern)


@pytest.mark.parametrize("method", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_no_dtype_is_converted_silently(dtype, method):
    pattern = jacpot.Pattern(torch.ones(2, 3, dtype=torch.bool))
    x, values = torch.ones(4, 3, dtype=dtype), torch.ones(6, dtype=dtype)
    for other in {torch.int64, torch.bfloat16, *DTYPES} - {dtype}:
        with pytest.raises(TypeError, match=r"'values' must be .* like 'x', got"):
            jacpot.masked_matmul(x, values.to(other), pattern, method=method)
        with pytest.raises(TypeError, match=r"'bias' must be .* like 'x', got"):
            jacpot.masked_matmul(x, values, pattern, torch.ones(2, dtype=other), method=method)


def test_takes_any_numpy_array_and_nothing_else():
    mask = draw_mask((6, 4), 0.5, 0)
    pattern = jacpot.Pattern(mask)
    generator = np.random.default_rng(0)
    x, values = generator.random((5, 4)), generator.random(pattern.nnz)
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (x, x[::-1, ::-1], frozen):
        expected = oracle.masked_matmul(
            torch.tensor(array.copy()), torch.tensor(values[::-1].copy()), mask
        )
        result = jacpot.masked_matmul(array, values[::-1], pattern)
        np.testing.assert_allclose(result, expected.numpy())
    weight = pattern.expand(values[::-1])
    assert isinstance(weight, np.ndarray)
    np.testing.assert_array_equal(pattern.compress(weight), values[::-1])
    tensors = torch.tensor(x), torch.tensor(values)
    for wrong in (
        (None, values, pattern),
        (x.tolist(), values, pattern),
        (x, None, pattern),
        (tensors[0], values, pattern),
        (x, tensors[1].requires_grad_(), pattern),
        (*tensors, mask),
    ):
        with pytest.raises(TypeError, match=r"argument '(x|values|pattern)' must be"):
            jacpot.masked_matmul(*wrong)
