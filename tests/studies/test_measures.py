from __future__ import annotations

import math

import pytest
import torch

from jacpot.studies import measures


def test_agreement_and_distance():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert measures.agreement(first, second) == 0.5
    assert measures.distance(first, second) == pytest.approx(1.0)
    assert measures.distance(first, first) == 0


def test_angle_runs_over_all_parameters():
    first = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    assert measures.angle(first, {"a": torch.tensor([0.0, 3.0])}) == pytest.approx(90)
    assert measures.angle(first, {"b": torch.ones(2)}) == pytest.approx(90)
    assert measures.angle(first, {"a": -first["a"]}) == pytest.approx(180)
    assert measures.angle(first, {"a": torch.ones(2)}) == pytest.approx(45)
    assert measures.angle({"a": torch.zeros(2)}, first) == pytest.approx(90)
    assert measures.norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}) == 5


def test_kernel_change():
    torch.manual_seed(0)
    features = torch.randn(30, 5, dtype=torch.float64)
    kernel = features @ features.T
    assert measures.kernel_change(kernel, 7 * kernel) == pytest.approx(0, abs=1e-12)
    # What centring removes, a constant added to every feature, is no change.
    moved = features + torch.randn(5, dtype=torch.float64)
    assert measures.kernel_change(kernel, moved @ moved.T) == pytest.approx(0, abs=1e-12)
    other = torch.randn(30, 5, dtype=torch.float64)
    assert 0.5 < measures.kernel_change(kernel, other @ other.T) < 1
    # Centring leaves nothing of the kernel of one example, or of a constant one.
    for flat in (torch.ones(1, 1), torch.ones(4, 4), torch.zeros(3, 3)):
        assert math.isnan(measures.kernel_change(flat, flat))
