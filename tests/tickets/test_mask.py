import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@st.composite
def masks(draw):
    shapes = draw(st.lists(st.sampled_from([(0,), (1,), (3, 2), (2, 1, 3, 3)]), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return Mask({f"w{i}": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)})


def test_ones_names_weights_and_keeps_all():
    mask = Mask.ones(make_net())
    assert list(mask) == ["0.weight", "3.weight"]
    assert mask.density == 1.0
    assert mask.numel == 35 + 15


def test_include_and_exclude_patterns():
    net = make_net()
    assert list(Mask.ones(net, include="*.bias")) == ["0.bias", "1.bias", "3.bias"]
    assert list(Mask.ones(net, include=["0.*"], exclude="*.bias")) == ["0.weight"]
    with pytest.raises(ValueError, match=r"'exclude'.*conv.*matches no parameter"):
        Mask.ones(net, exclude="conv*")


@settings(max_examples=40)
@given(masks())
def test_algebra(mask):
    assert ~~mask == mask
    assert (mask & ~mask).nnz == 0
    assert (mask | ~mask).nnz == mask.numel
    assert mask & mask == mask | mask == mask
    assert mask.nnz + (~mask).nnz == mask.numel
    assert mask.shuffle(3).densities == mask.densities


@settings(max_examples=20)
@given(masks())
def test_save_and_load(tmp_path_factory, mask):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask.save(path, {"method": "test"})
    loaded = Mask.load(path)
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


def test_load_refuses_other_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"not written by Mask\.save"):
        Mask.load(tmp_path / "other")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Mask.load(tmp_path)


@pytest.mark.parametrize("order", [None, "", "[", "3", "[]", '["b"]', '["a", "b"]', "[1]"])
def test_load_refuses_a_header_of_other_masks(tmp_path, order):
    path = tmp_path / "mask"
    Mask({"a": torch.ones(2, dtype=torch.bool)}).save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | {"order": order}
    metadata = {key: value for key, value in header.items() if value is not None}
    save_file({"a": torch.ones(2, dtype=torch.bool)}, path, metadata)
    with pytest.raises(ValueError, match="header does not list the masks"):
        Mask.load(path)


def test_density_means_kept_share():
    assert Mask({"w": torch.tensor([True, False, False, False])}).density == 0.25
    assert Mask({}).density == 1.0


def test_shuffle_moves_positions():
    mask = Mask({"w": torch.arange(1000) < 100})
    shuffled = mask.shuffle(1)
    assert shuffled != mask
    assert shuffled.nnz == mask.nnz
    assert mask["w"][:100].all()
    assert (shuffled["w"] & mask["w"]).sum() < 40


def test_a_mask_owns_its_tensors():
    tensor = torch.ones(3, dtype=torch.bool)
    mask = Mask({"w": tensor})
    tensor[0] = False
    assert mask.nnz == 3


def test_refusals():
    with pytest.raises(TypeError, match=r"bool tensors, got torch\.float32 for 'w'"):
        Mask({"w": torch.ones(2)})
    one, other = Mask({"w": torch.ones(2) > 0}), Mask({"v": torch.ones(2) > 0})
    with pytest.raises(ValueError, match="same parameters"):
        one & other
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        one | {"w": torch.ones(3) > 0}
    with pytest.raises(TypeError, match="'other' must map names to tensors, got list"):
        one & ["w"]
    with pytest.raises(ValueError, match="must hold values, got a tensor on the meta device for"):
        Mask({"w": torch.ones(2, dtype=torch.bool, device="meta")})


def test_state_dict_keys_are_those_of_an_applied_mask():
    net = make_net()
    mask = Mask.ones(net).shuffle() & ~Mask.ones(net)
    state = tickets.apply(net, mask).state_dict()
    own = mask.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items())
    assert Mask.from_state_dict(state) == mask


def test_table_counts():
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(Mask.ones(make_net()).table("ticket"))
    assert "5 x 7" in console.file.getvalue()
