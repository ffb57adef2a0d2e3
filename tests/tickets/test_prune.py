from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacpot import tickets
from jacpot.tickets import Mask

SCOPES = ["global", "layer", "erk", "balanced"]


@st.composite
def scores(draw, levels=4):
    shape = st.sampled_from([(1,), (4, 3), (2, 3, 3, 3), (17,)])
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    # A few levels only, so that ties are everywhere.
    return {
        f"w{i}": torch.randint(levels, s, generator=generator).float() for i, s in enumerate(shapes)
    }


@settings(max_examples=80)
@given(scores(), st.floats(0, 1), st.sampled_from(SCOPES))
def test_the_count_is_exact(scores, density, scope):
    mask = tickets.prune(scores, density, scope, allow_empty=True)
    numel = sum(s.numel() for s in scores.values())
    assert abs(mask.nnz - Fraction(density) * numel) <= 0.5 + 1e-12 * numel  # density·n is rounded
    assert {n: m.shape for n, m in mask.items()} == {n: s.shape for n, s in scores.items()}


@settings(max_examples=60)
@given(scores(), st.floats(0.05, 1))
def test_global_keeps_the_best_and_the_first_of_equals(scores, density):
    mask = tickets.prune(scores, density, allow_empty=True)
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.cat([m.flatten() for m in mask.values()])
    ranked = sorted(range(len(flat)), key=lambda i: (-flat[i].item(), i))
    assert set(kept.nonzero().flatten().tolist()) == set(ranked[: mask.nnz])


@settings(max_examples=60)
@given(scores(), scores(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(SCOPES))
def test_within_nests(scores, others, high, low, scope):
    low, high = sorted((low, high))
    outer = tickets.prune(scores, high, scope, allow_empty=True)
    generator = torch.Generator().manual_seed(0)
    fresh = {n: torch.rand(s.shape, generator=generator) for n, s in scores.items()}
    inner = tickets.prune(fresh, low, scope, within=outer, allow_empty=True)
    assert inner & outer == inner


def test_off_by_one_of_floating_point():
    # int((1 - 0.9) * 10) is 0
    assert tickets.prune({"w": torch.arange(10.0)}, 1 - 0.9).nnz == 1
    for kept in range(1, 1000):
        assert tickets.prune({"w": torch.zeros(1000)}, kept / 1000).nnz == kept


def test_all_tied_keeps_exactly_the_first():
    mask = tickets.prune({"w": torch.ones(10)}, 0.3)
    assert mask["w"].tolist() == [True] * 3 + [False] * 7


def test_layer_density_is_the_same_in_each():
    scores = {"a": torch.rand(100, 10), "b": 1000 + torch.rand(30, 10)}
    mask = tickets.prune(scores, 0.2, "layer")
    assert mask.densities == {"a": 0.2, "b": 0.2}


def test_erk_follows_its_formula_and_fills_up():
    scores = {"a": torch.rand(300, 784), "b": torch.rand(100, 300), "c": torch.rand(10, 100)}
    mask = tickets.prune(scores, 0.1, "erk")
    densities = mask.densities
    assert densities["c"] == 1.0
    ratio = densities["a"] / densities["b"]
    assert ratio == pytest.approx((1084 / 235200) / (400 / 30000), rel=1e-3)


def test_balanced_keeps_the_same_number_in_each():
    scores = {"a": torch.rand(100, 10), "b": torch.rand(50, 10), "c": torch.rand(5)}
    mask = tickets.prune(scores, 0.1, "balanced")
    assert Mask({"c": mask["c"]}).nnz == 5
    kept = [Mask({n: mask[n]}).nnz for n in "ab"]
    assert abs(kept[0] - kept[1]) <= 1


def test_density_by_name():
    scores = {"a": torch.rand(10), "b": torch.rand(4)}
    assert tickets.prune(scores, {"a": 0.3, "b": 0.5}).densities == {"a": 0.3, "b": 0.5}
    with pytest.raises(ValueError, match=r"must name \['a', 'b'\], got \['a'\]"):
        tickets.prune(scores, {"a": 0.3})


def test_refuses_to_empty_a_layer_unless_told():
    scores = {"a": torch.ones(4), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match="leaves b without a weight"):
        tickets.prune(scores, 0.5)
    assert tickets.prune(scores, 0.5, allow_empty=True).densities == {"a": 1.0, "b": 0.0}


def test_refusals():
    with pytest.raises(ValueError, match=r"'density' must lie in \[0, 1\], got 1.1"):
        tickets.prune({"a": torch.ones(4)}, 1.1)
    with pytest.raises(ValueError, match="not finite"):
        tickets.prune({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="'within' keeps only 1"):
        tickets.prune({"a": torch.ones(4)}, 0.5, within={"a": torch.arange(4) < 1})
    with pytest.raises(ValueError, match="'scope' must be"):
        tickets.prune({"a": torch.ones(4)}, 0.5, scope="local")
    with pytest.raises(TypeError, match="must be real numbers"):
        tickets.prune({"a": torch.ones(4) > 0}, 0.5)


def test_sizes_zero_and_one():
    mask = tickets.prune({"a": torch.rand(0, 3), "b": torch.rand(1)}, 1.0)
    assert mask.nnz == 1
    assert tickets.prune({}, 0.5).nnz == 0


def test_schedule_falls_by_the_same_factor():
    densities = tickets.schedule(0.01, 7, start=0.5)
    steps = [a / b for a, b in zip([0.5, *densities], densities, strict=False)]
    assert densities[-1] == 0.01
    assert steps == pytest.approx([steps[0]] * 7)


def test_iterative_pruning_scores_at_the_mask_so_far():
    seen = []

    def score(mask):
        seen.append(None if mask is None else mask.nnz)
        return {"w": torch.arange(100.0)}

    mask = tickets.prune_iteratively(score, 0.01, steps=2)
    assert seen == [None, 10]
    assert mask["w"].nonzero().item() == 99


def test_arguments_of_another_type_are_refused():
    scores = {"w": torch.rand(4)}
    with pytest.raises(TypeError, match="'density' must be a number, got 'x'"):
        tickets.prune(scores, density="x")
    with pytest.raises(TypeError, match="'w' must be a tensor, got ndarray"):
        tickets.prune({"w": scores["w"].numpy()}, 0.5)
    with pytest.raises(TypeError, match="'scores' must map names to tensors, got ndarray"):
        tickets.prune(scores["w"].numpy(), 0.5)
    with pytest.raises(TypeError, match="must hold bool tensors"):
        tickets.prune(scores, 0.5, within={"w": torch.ones(4)})
    with pytest.raises(TypeError, match="'masks' must map names to bool tensors, got list"):
        tickets.Mask([torch.ones(4, dtype=torch.bool)])
