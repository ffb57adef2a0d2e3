"""Products of a dense matrix with vectors, on every instruction set, against PyTorch's."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jacpot
from jacpot._backend import core

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    count=st.integers(1, 3),
    gap=st.integers(0, 3),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    transposed=st.booleans(),
    full=st.booleans(),
    seed=st.integers(0, 9),
)
def test_products_are_the_matrix_products(
    each_isa, rows, columns, count, gap, threads, dtype, transposed, full, seed
):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns + gap, generator=generator, dtype=dtype)[:, :columns]
    left = matrix.double().T if transposed else matrix.double()
    x = torch.randn(left.shape[1], count, generator=generator, dtype=torch.float64)
    out = numpy.full((left.shape[0], count), numpy.nan)
    operator = core.DenseOperator(matrix.numpy(), False, threads)
    operator.apply(x.numpy(), out, transposed, full)
    eps = EPS[torch.float64 if full else dtype]
    bound = 4 * (left.shape[1] + 2) * eps * (left.abs() @ x.abs())
    assert ((torch.from_numpy(out) - left @ x).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(300, 250), (900, 120), (120, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_both_products_of_a_least_squares_step_in_one_pass(each_isa, shape, dtype, threads):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, generator=generator, dtype=dtype)
    b = torch.randn(shape[0], 2, generator=generator, dtype=dtype)
    torch.set_num_threads(threads)
    solution = jacpot.solve(a, b, method="lsmr", tol=1e-11).raise_if_failed()
    exact, x = a.double(), solution.x
    r = b.double() - exact @ x
    pulled, size = (exact.T @ r).norm(dim=0), torch.linalg.matrix_norm(exact, 2)
    assert (
        (pulled <= 1.01e-11 * size * r.norm(dim=0)) | (r.norm(dim=0) <= 1.01e-11 * b.norm(dim=0))
    ).all()
    assert (x - torch.linalg.pinv(exact) @ b.double()).norm() <= 1e-7 * x.norm()
