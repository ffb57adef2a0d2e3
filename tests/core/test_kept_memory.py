"""Memory of freed results, which is kept for the next ones."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

import jacpot
from jacpot import _backend
from jacpot.ops import jacobian as ops

MIB = 1 << 20
LIKE = torch.empty(0)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lends kept pages to the system"
)


@pytest.fixture(autouse=True)
def nothing_kept():
    jacpot.release_memory()
    yield
    jacpot.release_memory()


def kept() -> int:
    return _backend.core.kept_bytes()


def result(mib: int) -> torch.Tensor:
    return _backend.empty((mib, MIB // 4), LIKE)


def test_the_next_result_lies_where_the_last_one_was():
    first = result(40)
    place = first.data_ptr()
    first.fill_(1)
    del first
    assert kept() == 40 * MIB
    for mib in (40, 36):
        again = result(mib)
        assert again.data_ptr() == place
        assert kept() == 0
        assert again.is_contiguous()
        assert again.dtype == torch.float32
        assert again.fill_(2).eq(2).all()
        del again


def test_a_view_holds_the_memory():
    whole = result(40)
    view = whole[3].fill_(7)
    del whole
    assert kept() == 0
    assert view.eq(7).all()
    assert result(40).data_ptr() != view.data_ptr() - 3 * MIB
    del view
    assert kept() > 0


def test_small_results_and_other_sizes_leave_what_is_kept():
    del [result(15)][:]
    assert kept() == 0
    del [result(100)][:]
    half = result(49)
    assert kept() == 100 * MIB
    larger = result(102)
    assert kept() == 100 * MIB
    del half, larger


def test_what_is_kept_has_a_limit():
    for _ in range(2):
        held = [result(300) for _ in range(5)]  # untouched: pages that nobody writes take nothing
        del held
        assert kept() == 900 * MIB
    del [result(1026)][:]
    assert kept() == 900 * MIB


def test_memory_is_released():
    del [result(40)][:]
    jacpot.release_memory()
    assert kept() == 0


def test_all_the_memory_there_is():
    with pytest.raises(RuntimeError, match="memory"):
        _backend.empty((1 << 40, 1 << 10), LIKE)
    with pytest.raises(RuntimeError):
        _backend.empty((1 << 62, 1 << 62), LIKE)


def test_threads_get_memory_of_their_own():
    def work(number):
        for _ in range(20):
            mine = result(33)
            mine[::8] = number
            assert mine[::8].eq(number).all()
            del mine

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert 33 * MIB <= kept() <= 4 * 34 * MIB


@pytest.mark.parametrize("kind", [torch.Tensor, numpy.ndarray])
def test_kernels_and_rows_come_from_it(kind):
    a, s = torch.randn(400, 1, 1, 3), torch.randn(400, 8, 1, 1, 2)
    expected = torch.einsum("ni,mi,nko,mlo->nkml", a[:, 0, 0], a[:, 0, 0], *[s[:, :, 0, 0]] * 2)
    factors = (a, s) if kind is torch.Tensor else (a.numpy(), s.numpy())
    for _ in range(2):  # 39 MiB: the second one over what the first one left
        kernel = ops.gram([ops.Factors(*factors)], outputs="full")
        assert isinstance(kernel, kind)
        torch.testing.assert_close(torch.as_tensor(kernel), expected, rtol=1e-4, atol=1e-4)
        del kernel
        assert kept() == 40 * MIB
    many = [f.repeat(600, *[1] * (f.ndim - 1)) for f in (a, s)]
    assert ops.dense([ops.Factors(*many)]).shape == (240_000, 8, 6)
    assert kept() == 84 * MIB
