"""NumPy arrays of every layout give the same numbers, and what has none is refused by name."""

import numpy as np
import pytest
import torch

import jacpot
from jacpot import tickets
from jacpot.ops import jacobian as ops

RNG = np.random.default_rng(0)
MASK = RNG.random((5, 8)) < 0.5
PATTERN = jacpot.Pattern(MASK)


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


X, VALUES, BIAS = normal(6, 8), normal(PATTERN.nnz), normal(5)
A, S, V, U = normal(3, 4, 1, 2), normal(3, 2, 4, 1, 5), normal(10), normal(3, 2)
FACTORS = [ops.Factors(A, S)]
MATRIX = normal(4, 4) + 6 * np.eye(4, dtype=np.float32)
RHS, SAMPLES = normal(4), normal(6, 7)

# The argument's name, a good value, and what is done with it.
USES = [
    ("mask", MASK, lambda mask: jacpot.Pattern(mask).mask().numpy()),
    ("weight", normal(5, 8), PATTERN.compress),
    ("values", VALUES, PATTERN.expand),
    ("x", X, lambda x: jacpot.masked_matmul(x, VALUES, PATTERN, BIAS)),
    ("values", VALUES, lambda values: jacpot.masked_matmul(X, values, PATTERN, BIAS)),
    ("bias", BIAS, lambda bias: jacpot.masked_matmul(X, VALUES, PATTERN, bias)),
    ("activations", A, lambda a: ops.gram([ops.Factors(a, S)])),
    ("signals", S, lambda s: ops.dense([ops.Factors(A, s)])),
    ("rows", normal(3, 2, 10), lambda rows: ops.column_norms([ops.Rows(rows)])),
    ("vectors[0]", V, lambda v: ops.jvp(FACTORS, [v])),
    ("u", U, lambda u: ops.vjp(FACTORS, u)[0]),
    ("operator", MATRIX, lambda matrix: jacpot.solve(matrix, RHS, method="lsmr").x),
    ("rhs", RHS, lambda rhs: jacpot.solve(MATRIX, rhs, method="lsmr").x),
    ("x0", RHS, lambda x0: jacpot.solve(MATRIX, RHS, method="lsmr", x0=x0).x),
    ("samples", SAMPLES, lambda samples: tickets.subset_sum(samples, SAMPLES[:, 0]).sums),
    ("targets", SAMPLES[:, 0], lambda goals: tickets.subset_sum(SAMPLES, goals).sums),
]
NAMES = [f"{name}-{index}" for index, (name, *_) in enumerate(USES)]


def strided(array):
    wide = np.zeros([2 * size for size in array.shape], array.dtype)
    wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return wide[tuple(slice(None, None, 2) for _ in array.shape)]


def unaligned(array):
    view = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    "strided": strided,
    "backwards": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "Fortran": np.asfortranarray,
    "unaligned": unaligned,
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "good", "use"), USES, ids=NAMES)
def test_every_layout_gives_the_same_numbers(name, good, use, layout):
    given = LAYOUTS[layout](good)
    result = use(given)
    assert type(result) is np.ndarray
    np.testing.assert_allclose(result, use(good), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(given, good)


KINDS = {
    "half": lambda array: array.astype(np.float16),
    "integer": lambda array: array.astype(np.int64),
    "complex": lambda array: array.astype(np.complex64),
    "long double": lambda array: array.astype(np.longdouble),
    "big-endian": lambda array: array.astype(">i4" if array.dtype == bool else ">f4"),
    "object": lambda array: array.astype(object),
    "masked": np.ma.masked_array,
    "list": lambda array: array.tolist(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "good", "use"), USES, ids=NAMES)
def test_what_is_not_taken_is_refused_by_name(name, good, use, kind):
    with pytest.raises(TypeError) as caught:
        use(KINDS[kind](good))
    message = str(caught.value)
    # Of two arrays that differ in dtype, either one may be called the odd one.
    assert f"argument {name!r} " in message or f" like {name!r}" in message


@pytest.mark.parametrize("layout", ["strided", "backwards", "unaligned", "read-only"])
def test_results_are_written_where_the_caller_said_or_nowhere(layout):
    out = np.zeros((3, 3), np.float32)
    assert ops.gram(FACTORS, outputs="trace", out=out) is out
    np.testing.assert_array_equal(out, ops.gram(FACTORS, outputs="trace"))
    with pytest.raises(
        ValueError, match="'out' must be writeable, aligned and contiguous in C order"
    ):
        ops.gram(FACTORS, outputs="trace", out=LAYOUTS[layout](np.zeros((3, 3), np.float32)))


def test_a_strided_bias_of_tensors():
    bias = torch.from_numpy(strided(BIAS))
    x, values = torch.from_numpy(X), torch.from_numpy(VALUES)
    expected = jacpot.masked_matmul(x, values, PATTERN, bias.contiguous())
    assert torch.equal(jacpot.masked_matmul(x, values, PATTERN, bias), expected)
