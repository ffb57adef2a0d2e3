from __future__ import annotations

import json

import numpy as np
import pytest

from jacpot.studies.record import Record

SETTINGS = {"net": "mlp", "widths": (4, 5)}


def open_record(folder, settings=SETTINGS, fresh=False, study="compare"):
    return Record(folder, study, settings, {"data": {"name": "toy"}}, fresh)


def filled(folder):
    record = open_record(folder)
    for seed in (0, 1):
        record.add(seed, {"number": seed + 0.5}, {"network": np.full((2, 3), seed, np.float32)})
    return record


def test_finished_seeds_are_taken_up_again(tmp_path):
    filled(tmp_path / "a" / "b")
    again = open_record(tmp_path / "a" / "b")
    assert again.runs == {0: {"number": 0.5}, 1: {"number": 1.5}}
    np.testing.assert_array_equal(again.arrays(1)["network"], np.ones((2, 3)))
    result = json.loads(again.path.read_text())
    assert result["settings"] == {"net": "mlp", "widths": [4, 5]}
    assert result["data"] == {"name": "toy"}
    assert {"version", "torch", "numpy", "isa", "threads", "processor"} <= set(
        result["environment"]
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_new_folder_is_only_made_when_there_is_something_to_keep(tmp_path):
    record = open_record(tmp_path / "new")
    assert record.runs == {}
    assert not (tmp_path / "new").exists()


def test_other_settings_are_refused(tmp_path):
    filled(tmp_path)
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(
        ValueError,
        match=r"result\.json was made with .* \(net was 'mlp' and is now 'cnn'\); .* --fresh",
    ):
        open_record(tmp_path, {**SETTINGS, "net": "cnn"})
    with pytest.raises(ValueError, match="depth was None and is now 3"):
        open_record(tmp_path, {**SETTINGS, "depth": 3})
    with pytest.raises(ValueError, match="holds the results of `jacpot compare`"):
        open_record(tmp_path, study="tickets")
    assert (tmp_path / "result.json").read_text() == before
    assert open_record(tmp_path, {**SETTINGS, "net": "cnn"}, fresh=True).runs == {}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 1, "study": "compare", "settings": {}, "runs": []}',
        '{"format": 1, "study": "compare", "settings": {}, "runs": {"x": {}}}',
        '{"format": 99, "study": "compare", "settings": {}, "runs": {}}',
    ],
)
def test_a_damaged_result_is_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "result.json"
    path.write_text(damage)
    with pytest.raises(
        ValueError, match=r"result\.json (is damaged|is not a result|has format 99).*--fresh"
    ):
        open_record(tmp_path)
    assert path.read_text() == damage
    assert open_record(tmp_path, fresh=True).runs == {}


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged"):
        open_record(tmp_path)


@pytest.mark.parametrize("damage", [None, b"", b"junk", b"PK\x03\x04junk"])
def test_seeds_without_their_arrays_are_computed_again(tmp_path, damage):
    filled(tmp_path)
    path = tmp_path / "outputs" / "seed-1.npz"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert list(open_record(tmp_path).runs) == [0]


def test_a_truncated_array_file_is_not_believed(tmp_path):
    filled(tmp_path)
    path = tmp_path / "outputs" / "seed-0.npz"
    path.write_bytes(path.read_bytes()[:-30])
    assert list(open_record(tmp_path).runs) == [1]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: .*file is a file, not a folder"):
        open_record(tmp_path / "file")
