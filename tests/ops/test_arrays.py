"""Arrays of other libraries. CuPy is stood in for: its arrays need a GPU to exist."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch

import jacpot
from jacpot.ops import jacobian as ops
from jacpot.ops.arrays import as_tensor, like

DEVICE_OF_CPU = (1, 0)


class Array:
    """What of a CuPy array the library sees."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.shape, self.ndim = tuple(tensor.shape), tensor.ndim
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.strides = tuple(stride * tensor.element_size() for stride in tensor.stride())

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return DEVICE_OF_CPU


Array.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.from_dlpack = Array
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupy_arrays_share_their_memory(cupy):
    tensor = torch.arange(6.0).view(2, 3)
    seen = as_tensor("x", Array(tensor))
    assert seen.data_ptr() == tensor.data_ptr()
    assert isinstance(like(seen, Array(tensor)), Array)
    assert like(seen, Array(tensor)).tensor.data_ptr() == tensor.data_ptr()


class Flipped(Array):
    """A view that runs backwards, which no tensor can be."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.strides = tuple(-stride for stride in self.strides)

    def __dlpack__(self, **keywords):
        raise AssertionError("a tensor has no negative strides")

    def copy(self):
        return Array(self.tensor.flip(0))


Flipped.__module__ = "cupy"


def test_cupy_views_that_run_backwards_are_copied(cupy):
    assert torch.equal(as_tensor("x", Flipped(torch.arange(3))), torch.tensor([2, 1, 0]))


def test_pattern_of_a_cupy_mask(cupy):
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert jacpot.Pattern(Array(mask)) == jacpot.Pattern(mask)


def test_numpy_arrays_share_their_memory():
    array = np.arange(6.0).reshape(2, 3)
    assert as_tensor("x", array).data_ptr() == array.ctypes.data
    assert isinstance(like(as_tensor("x", array), array), np.ndarray)


def test_cupy_in_cupy_out(cupy):
    pattern = jacpot.Pattern(torch.tensor([[True, False, True], [False, False, True]]))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    y = jacpot.masked_matmul(Array(x), Array(torch.ones(3)), pattern)
    assert isinstance(y, Array)
    assert torch.equal(y.tensor, torch.tensor([[4.0, 3.0]]))


def test_jacobians_of_cupy_arrays(cupy):
    a, s = torch.randn(3, 1, 1, 4), torch.randn(3, 2, 1, 1, 5)
    theirs, ours = [ops.Factors(Array(a), Array(s))], [ops.Factors(a, s)]
    v, u = torch.randn(20), torch.randn(3, 2)
    for got, expected in (
        (ops.jvp(theirs, [Array(v)]), ops.jvp(ours, [v])),
        (ops.vjp(theirs, Array(u))[0], ops.vjp(ours, u)[0]),
        (ops.gram(theirs), ops.gram(ours)),
        (ops.dense(theirs), ops.dense(ours)),
        (ops.row_norms(theirs), ops.row_norms(ours)),
        (ops.sketch(theirs, 8), ops.sketch(ours, 8)),
    ):
        assert isinstance(got, Array)
        assert torch.equal(got.tensor, expected)
    out = torch.zeros(3, 3)
    given = Array(out)
    assert ops.gram(theirs, outputs="trace", out=given) is given
    assert torch.equal(out, ops.gram(ours, outputs="trace"))


class Operator:
    """A sparse matrix of CuPy, as far as `solve` looks at it."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), np.dtype("float64")

    @property
    def T(self):
        return Operator(self.tensor.T)

    def __matmul__(self, x):
        return Array(self.tensor @ x.tensor)


Operator.__module__ = "cupyx.scipy.sparse"


def test_solve_with_cupy_arrays(cupy):
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double()
    rhs = torch.tensor([1.0, 2.0]).double()
    expected = torch.linalg.solve(matrix, rhs)

    def function(v):
        assert isinstance(v, Array)
        return Array(matrix @ v.tensor)

    right = Array(rhs)
    for operator in (Array(matrix), Operator(matrix), function):
        solution = jacpot.solve(operator, right, tol=1e-12)
        assert solution.converged
        assert isinstance(solution.x, Array)
        torch.testing.assert_close(solution.x.tensor, expected)


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.coo_matrix])
def test_stored_entries_of_a_sparse_matrix_are_kept(make):
    mask = np.random.default_rng(0).random((13, 29)) < 0.2
    pattern = jacpot.Pattern(make(mask.astype(np.float32)))
    assert torch.equal(pattern.mask(), torch.from_numpy(mask))


def test_negated_views_are_read_with_their_sign():
    """As ``z.conj().imag`` is, whose memory is that of ``z.imag``."""
    torch.manual_seed(0)
    x = torch.complex(torch.zeros(5, 4).double(), torch.randn(5, 4).double()).conj().imag
    assert x.is_neg()
    pattern = jacpot.Pattern(torch.rand(3, 4) < 0.6)
    values = torch.randn(pattern.nnz).double()
    plain = x.clone()
    expected = plain @ pattern.expand(values).T
    layer = jacpot.nn.SparseLinear.from_linear(torch.nn.Linear(4, 3).double(), pattern.mask())
    torch.testing.assert_close(jacpot.masked_matmul(x, values, pattern), expected)
    torch.testing.assert_close(layer(x), layer(plain))
    assert torch.equal(pattern.compress(x[:3]), pattern.compress(plain[:3]))
    rows, same = ops.Rows(x[:, None]), ops.Rows(plain[:, None])
    assert torch.equal(ops.jvp([rows], [x[0]]), ops.jvp([same], [plain[0]]))
    assert torch.equal(ops.vjp([rows], x[:, :1])[0], ops.vjp([same], plain[:, :1])[0])
    matrix = plain.T @ plain
    found = jacpot.solve(torch._neg_view(-matrix), x[0])
    assert torch.equal(found.x, jacpot.solve(matrix, plain[0]).x)
    with pytest.raises(ValueError, match=r"'out' .* not a negated view"):
        ops.gram([rows], out=torch._neg_view(torch.empty(5, 1, 5, 1).double()))


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
def test_layouts_that_have_no_strides_are_refused_by_name(layout):
    x = getattr(torch.eye(3), layout)()
    pattern = jacpot.Pattern(torch.eye(3, dtype=torch.bool))
    for name, call in {
        "x": lambda: jacpot.masked_matmul(x, torch.ones(3), pattern),
        "weight": lambda: pattern.compress(x),
        "rows": lambda: ops.Rows(x),
        "rhs": lambda: jacpot.solve(torch.eye(3), x),
    }.items():
        with pytest.raises(TypeError, match=f"{name!r} must be a dense tensor, got layout"):
            call()
