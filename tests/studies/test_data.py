from __future__ import annotations

import gzip
import io
import os
import zipfile

import numpy as np
import pytest

from jacpot.studies import data, sources

rng = np.random.default_rng(0)


def arrays(**changes):
    """A small set of pictures in four arrays; ``changes`` replaces some, or drops those None."""
    four = {
        "x_train": rng.integers(0, 256, (12, 5, 4), dtype=np.uint8),
        "y_train": np.arange(12, dtype=np.uint8) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8) % 3,
    }
    return {key: value for key, value in {**four, **changes}.items() if value is not None}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def same(dataset, four):
    np.testing.assert_array_equal(dataset.x_train[:, 0], four["x_train"])
    np.testing.assert_array_equal(dataset.y_test, four["y_test"])


def test_four_arrays(tmp_path):
    four = arrays()
    np.savez(tmp_path / "mine.npz", extra=np.zeros(1), **four)
    dataset = data.load(tmp_path / "mine.npz")
    same(dataset, four)
    assert dataset.name == "mine"
    assert dataset.x_train.shape == (12, 1, 5, 4)
    assert dataset.classes == 3
    assert dataset.is_image


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_come_first(tmp_path, channels):
    last = rng.integers(0, 256, (12, 8, 6, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **arrays(x_train=last, x_test=last[:6]))
    np.savez(
        tmp_path / "b.npz",
        **arrays(x_train=last.transpose(0, 3, 1, 2), x_test=last[:6].transpose(0, 3, 1, 2)),
    )
    first, second = data.load(tmp_path / "a.npz"), data.load(tmp_path / "b.npz")
    np.testing.assert_array_equal(first.x_train, last.transpose(0, 3, 1, 2))
    assert first.fingerprint() == second.fingerprint()


def test_table_with_labels_or_targets(tmp_path):
    x = rng.normal(size=(40, 3))
    np.savez(tmp_path / "labels.npz", X=x, y=np.arange(40) % 4)
    np.savez(tmp_path / "targets.npz", X=x, y=np.arange(40) / 4)
    np.savez(tmp_path / "several.npz", X=x, y=rng.normal(size=(40, 2)))
    labels = data.load(tmp_path / "labels.npz")
    targets = data.load(tmp_path / "targets.npz")
    assert (labels.classes, labels.y_train.shape) == (4, (30,))
    assert (targets.classes, targets.y_train.shape, targets.y_test.shape) == (
        None,
        (30, 1),
        (10, 1),
    )
    assert data.load(tmp_path / "several.npz").y_test.shape == (10, 2)
    # Every example is on exactly one side, and a second load draws the same sides.
    rows = np.concatenate([targets.x_train, targets.x_test])
    assert len(np.unique(rows, axis=0)) == 40
    again = data.load(tmp_path / "targets.npz")
    assert again.fingerprint() == targets.fingerprint()
    assert again.fingerprint() != labels.fingerprint()


BAD = {
    "missing array": (arrays(y_test=None), "expected the arrays x_train.*it holds x_test"),
    "NaN": (arrays(x_train=np.full((12, 2), np.nan)), "'x_train' must be finite.*24 NaN"),
    "infinite": (
        {"X": np.ones((8, 2)), "y": np.array([np.inf] + [0.0] * 7)},
        r"'y' must be finite.*\[0\]",
    ),
    "complex": (
        arrays(x_train=np.ones((12, 2), complex)),
        "'x_train' must hold real numbers.*complex",
    ),
    "text": (arrays(y_train=np.array(["a"] * 12)), "'y_train' must hold integer labels"),
    "rank": (arrays(x_train=np.ones(12)), "'x_train' must have shape"),
    "empty": (arrays(x_train=np.ones((0, 5, 4))), "'x_train' is empty"),
    "length": (arrays(y_train=np.zeros(11, int)), r"'y_train' must have as many rows.*12.*11"),
    "test shape": (
        arrays(x_test=np.ones((6, 5, 5), np.uint8)),
        "'x_train' and 'x_test' must agree",
    ),
    "test kind": (arrays(y_test=np.ones(6)), "'y_train' and 'y_test' must agree"),
    "label shape": (arrays(y_train=np.zeros((12, 2), int)), "one integer label per example"),
    "negative label": (arrays(y_train=np.arange(12) % 3 - 1), "labels must be.*lowest is -1"),
    "gap": (arrays(y_train=np.arange(12) % 3 * 2), "no training example has 1"),
    "unseen": (arrays(y_test=np.full(6, 7)), "no training example has 3"),
    "few": ({"X": np.ones((3, 2)), "y": np.arange(3)}, "at least 4 examples"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_name_file_and_array(tmp_path, case):
    held, message = BAD[case]
    np.savez(tmp_path / "bad.npz", **held)
    with pytest.raises(ValueError, match=rf"(?s)bad\.npz.*{message}"):
        data.load(tmp_path / "bad.npz")


def test_python_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "bad.npz", X=np.array([{}, 1] * 4, object), y=np.arange(8))
    with pytest.raises(ValueError, match=r"bad\.npz: array 'X' cannot be read: it holds Python"):
        data.load(tmp_path / "bad.npz")


def test_damaged_files(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    for content in (b"", b"not an archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz.*not (a readable|an) \.npz"):
            data.load(path)
    # A flipped byte inside the compressed array is found by its checksum.
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        start = archive.getinfo("x_train.npy").header_offset
    broken = bytearray(whole)
    broken[start + 120] ^= 0xFF
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError, match=r"bad\.npz: array 'x_train' cannot be read"):
        data.load(path)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of digits, .* got 'cifar'"):
        data.load("cifar")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        data.load(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match="JACPOT_DATA: there is no folder"):
        data.load("mnist", tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "sub", "suffix"),
    [("mnist", "", ".gz"), ("mnist", "MNIST/raw", ""), ("fashion-mnist", "fashion-mnist", ".gz")],
)
def test_idx_files(tmp_path, name, sub, suffix):
    four = arrays()
    for key, file in sources.IDX_FILES.items():
        write_idx(tmp_path / sub / (file + suffix), four[key])
    dataset = data.load(name, tmp_path)
    same(dataset, four)
    assert dataset.source == str(tmp_path / sub)


def test_damaged_idx(tmp_path):
    four = arrays()
    for key, file in sources.IDX_FILES.items():
        write_idx(tmp_path / file, four[key])
    path = tmp_path / sources.IDX_FILES["x_train"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train-images.*239 bytes where .* \(12, 5, 4\)"):
        data.load("mnist", tmp_path)
    path.write_bytes(b"\x00\x00\x0d\x03")
    with pytest.raises(ValueError, match=r"train-images.*not an IDX file"):
        data.load("mnist", tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match=r"train-images.*not a readable gzip"):
        data.load("mnist", tmp_path)


def test_cifar_records(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(10, -1)], 1)
    for file in sources.CIFAR_TRAIN + sources.CIFAR_TEST:
        records.tofile(folder / file)
    dataset = data.load("cifar10", tmp_path)
    assert dataset.x_train.shape == (50, 3, 32, 32)
    np.testing.assert_array_equal(dataset.x_test, pixels)
    np.testing.assert_array_equal(dataset.y_test, labels)
    (folder / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"test_batch\.bin: 3 bytes"):
        data.load("cifar10", tmp_path)


def test_part_of_a_set_stands_in_for_it(tmp_path):
    np.savez(tmp_path / "cifar10_20k.npz", **arrays())
    assert data.load("cifar10", tmp_path).source.endswith("cifar10_20k.npz")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "california"])
def test_offline_and_absent_says_what_to_do(tmp_path, monkeypatch, name):
    def unreachable(name):
        raise OSError("no route to host")

    monkeypatch.setattr(sources, "_download", unreachable)
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert f"{name}.npz" in message
    assert str(tmp_path) in message
    assert "no route to host" in message
    assert "JACPOT_DATA" in message
    assert "--data digits" in message


@pytest.mark.skipif(not os.environ.get("JACPOT_DATA"), reason="JACPOT_DATA is not set")
def test_mnist_is_mnist():
    dataset = data.load("mnist")
    assert dataset.x_train.shape == (60000, 1, 28, 28)
    assert np.bincount(dataset.y_test).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
