from __future__ import annotations

import numpy as np
import pytest
import torch

from jacpot.studies.data import from_arrays, load
from jacpot.studies.split import split


def table(count=80, columns=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 2, (count, columns))
    return from_arrays("table", {"X": x, "y": 100 + 30 * x[:, 0]}, "memory")


def test_sizes_and_disjointness():
    parts = split(load("digits"), train_size=200, test_size=50)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (200, 36, 50)
    everything = split(load("digits"))
    assert len(everything.train) + len(everything.validation) == 1347
    drawn = torch.cat([everything.train.labels, everything.validation.labels])
    assert torch.bincount(drawn).tolist() == np.bincount(load("digits").y_train).tolist()


def test_the_seed_fixes_the_split():
    one, same, other = (split(load("digits"), 100, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.train.x, same.train.x)
    assert not torch.equal(one.train.labels, other.train.labels)
    assert torch.equal(one.test.labels, other.test.labels)


def test_statistics_are_those_of_the_training_examples():
    parts = split(table())
    torch.testing.assert_close(parts.train.x.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.train.x.std(0, correction=0), torch.ones(3))
    assert parts.test.x.mean().abs() > 1e-3


def test_constant_columns_stay_finite():
    x = np.random.default_rng(0).normal(size=(40, 2))
    x[:, 1] = 0.1
    parts = split(from_arrays("table", {"X": x, "y": np.zeros(40)}, "memory"))
    assert torch.isfinite(parts.test.x).all()
    assert torch.equal(parts.train.x[:, 1], torch.zeros(len(parts.train)))
    assert torch.equal(parts.train.targets, torch.zeros(len(parts.train), 1))


def test_errors_in_the_data_s_own_units():
    parts = split(table())
    nothing = torch.zeros_like(parts.train.targets)
    assert parts.error(nothing, parts.train) == pytest.approx(float(parts.target_scale), rel=1e-5)
    assert parts.error(parts.train.targets, parts.train) == 0
    assert parts.loss(nothing, parts.train) == pytest.approx(0.5, rel=1e-5)
    digits = split(load("digits"))
    assert digits.error(digits.test.targets, digits.test) == 0
    assert digits.train.targets.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("size", [0, -1, 1146])
def test_refuses_impossible_sizes(size):
    with pytest.raises(ValueError, match=r"train_size: expected 1 to 1144 .* got"):
        split(load("digits"), size)
    with pytest.raises(ValueError, match="test_size: expected 1 to 450"):
        split(load("digits"), 10, 451)


def test_one_training_example():
    parts = split(table(), 1)
    assert torch.isfinite(parts.train.x).all()
    assert len(parts.validation) == 1
