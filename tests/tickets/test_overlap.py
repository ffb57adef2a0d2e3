import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask


def random_mask(density, seed, n=200):
    generator = torch.Generator().manual_seed(seed)
    return Mask({k: torch.rand(n, n, generator=generator) < density for k in "ab"})


@given(st.floats(0.05, 0.95), st.integers(0, 100))
def test_independent_masks_overlap_by_chance(density, seed):
    found = tickets.overlap(random_mask(density, seed), random_mask(density, seed + 1000))
    assert found.jaccard == pytest.approx(density / (2 - density), abs=0.03)
    assert found.expected_jaccard == pytest.approx(density / (2 - density), abs=0.02)
    assert abs(found.excess) < 0.1
    assert all(abs(layer.excess) < 0.15 for layer in found.layers.values())


def test_a_mask_with_itself_and_with_its_complement():
    mask = random_mask(0.3, 0)
    same, opposite = tickets.overlap(mask, mask), tickets.overlap(mask, ~mask)
    assert (same.jaccard, same.excess) == (1.0, 1.0)
    assert opposite.jaccard == 0
    assert opposite.excess < 0


def test_chance_counts_layer_densities():
    # Equal layer densities alone make global positions coincide; that is chance, too.
    a = Mask({"a": torch.rand(100, 100) < 0.9, "b": torch.rand(100, 100) < 0.1})
    b = Mask({"a": torch.rand(100, 100) < 0.9, "b": torch.rand(100, 100) < 0.1})
    found = tickets.overlap(a, b)
    assert found.jaccard > 0.6
    assert abs(found.excess) < 0.05


def test_empty_masks():
    none = ~random_mask(2.0, 0)
    assert tickets.overlap(none, none).jaccard == 1.0
    assert tickets.overlap(Mask({}), Mask({})).jaccard == 1.0
    with pytest.raises(ValueError, match="same parameters"):
        tickets.overlap(none, Mask({}))


def test_sign_agreement():
    torch.manual_seed(0)
    a, b = nn.Linear(100, 100), nn.Linear(100, 100)
    assert tickets.sign_agreement(a, a)["all"] == 1.0
    assert tickets.sign_agreement(a, b)["all"] == pytest.approx(0.5, abs=0.03)
    mask = {"weight": torch.sign(a.weight) == torch.sign(b.weight)}
    assert tickets.sign_agreement(a, b, mask) == {"weight": 1.0, "all": 1.0}


def test_full_masks_are_equal_and_both_are_checked():
    full = {"w": torch.ones(3, dtype=torch.bool)}
    assert tickets.overlap(full, full).excess == 1
    empty = {"w": torch.zeros(3, dtype=torch.bool)}
    assert tickets.overlap(empty, empty).excess == 1
    with pytest.raises(TypeError, match="must hold bool tensors"):
        tickets.overlap(full, {"w": torch.ones(3)})
