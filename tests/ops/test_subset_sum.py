import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot import tickets
from jacpot.reference.subset_sum import subset_sum as every_subset


@settings(max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(0, 20),
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0.01, 10),
    st.booleans(),
)
def test_finds_the_nearest_of_all_subsets(n, rows, seed, dtype, scale, coarse):
    generator = torch.Generator().manual_seed(seed)
    samples = (torch.rand(rows, n, generator=generator, dtype=dtype) * 2 - 1) * scale
    targets = (torch.rand(rows, generator=generator, dtype=dtype) * 4 - 2) * scale
    if coarse:  # equal sums everywhere
        samples, targets = samples.round(), targets.round()
    found = tickets.subset_sum(samples, targets)
    _, sums = every_subset(samples, targets)
    assert found.mask.shape == (rows, n)
    assert found.sums.dtype == torch.float64
    error, best = (found.sums - targets).abs(), (sums - targets).abs()
    assert torch.allclose(error, best, rtol=0, atol=1e-14 * scale * max(n, 1))
    again = (samples.double() * found.mask).sum(1)
    assert torch.allclose(found.sums, again, rtol=0, atol=1e-14 * scale * max(n, 1))


def test_any_strides():
    samples = torch.rand(14, 9, dtype=torch.float64)
    targets = torch.rand(18, dtype=torch.float64)
    found = tickets.subset_sum(samples.T, targets[::2])
    plain = tickets.subset_sum(samples.T.contiguous(), targets[::2].contiguous())
    assert torch.equal(found.mask, plain.mask)


def test_numpy_in_numpy_out():
    found = tickets.subset_sum(np.array([[0.5, 0.25]]), np.array([0.7]))
    assert isinstance(found.mask, np.ndarray)
    assert found.sums.tolist() == [0.75]


def test_the_number_of_threads_changes_nothing():
    samples, targets = torch.rand(300, 11).round(decimals=1), torch.rand(300) * 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tickets.subset_sum(samples, targets)
        torch.set_num_threads(2)
        two = tickets.subset_sum(samples, targets)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.mask, two.mask)


def test_largest_number_of_samples():
    samples = torch.rand(2, 32, dtype=torch.float64) * 2 - 1
    found = tickets.subset_sum(samples, torch.tensor([0.3, -0.4]).double())
    assert (found.sums - torch.tensor([0.3, -0.4]).double()).abs().max() < 1e-6
    with pytest.raises(NotImplementedError, match="at most 32 samples"):
        tickets.subset_sum(torch.rand(1, 33), torch.rand(1))


def test_refusals():
    with pytest.raises(ValueError, match=r"'samples' must have shape \(M, n\), got \(3,\)"):
        tickets.subset_sum(torch.rand(3), torch.rand(3))
    with pytest.raises(ValueError, match=r"'targets' must have shape \(2,\), got \(3,\)"):
        tickets.subset_sum(torch.rand(2, 4), torch.rand(3))
    with pytest.raises(TypeError, match="'targets' must be float32 like 'samples', got float64"):
        tickets.subset_sum(torch.rand(2, 4), torch.rand(2).double())
    with pytest.raises(ValueError, match="'samples' must be finite"):
        tickets.subset_sum(torch.full((1, 2), float("nan")), torch.rand(1))
    with pytest.raises(TypeError, match="'samples' must be a NumPy, PyTorch or CuPy array"):
        tickets.subset_sum([[1.0]], torch.rand(1))
