"""Data sets for the studies: read, checked, and in one layout whatever file they came from."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jacpot.studies import sources

__all__ = ["NAMES", "Dataset", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "california")

# Draws the test set of data that come without one: a constant, so that every run, whatever its
# seed, is tested on the same examples.
TEST_SEED = 20190101


@dataclass(frozen=True)
class Dataset:
    """Arrays of one data set, as stored (unscaled), checked.

    Attributes
    ----------
    name
        ``"digits"``, ``"mnist"``, ..., or the stem of the file.
    x_train, x_test
        ``(N, C, H, W)`` for images, ``(N, D)`` for tables; any real dtype, finite.
    y_train, y_test
        Integer labels ``(N,)`` from ``0`` to ``classes - 1``, or float64 targets ``(N, K)``.
    classes
        Number of classes; None for regression.
    source
        Where the arrays came from: a path, or ``"scikit-learn"``.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    classes: int | None
    source: str

    @property
    def is_image(self) -> bool:
        """Whether an example is a picture ``(C, H, W)``."""
        return self.x_train.ndim == 4

    def fingerprint(self) -> str:
        """SHA-256 over the arrays: the same data give the same string, from any file."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(name: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by name, or from an ``.npz`` file.

    Parameters
    ----------
    name
        One of ``digits`` (8x8 handwritten digits that ship with scikit-learn), ``mnist``,
        ``fashion-mnist``, ``cifar10``, ``california`` (house prices, regression), or the path of
        an ``.npz`` file that holds ``x_train, y_train, x_test, y_test``, or ``X, y`` (a quarter
        becomes the test set, always the same). Integer ``y`` are labels ``0..C-1``, float ``y``
        are regression targets.
    folder
        Folder with the named data (``.npz`` or IDX files, gzipped or not); the environment
        variable ``JACPOT_DATA`` by default. What it does not hold is downloaded, with its hash
        checked, into the user's cache.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        If the data are neither at hand nor to be downloaded; the message says what to do.
    ValueError
        If an array is missing, damaged, of a wrong shape, or not finite, or if labels are not
        ``0..C-1``. The message names the file and the array.

    Examples
    --------
    >>> from jacpot.studies import data
    >>> digits = data.load("digits")
    >>> digits.x_train.shape, digits.x_test.shape, digits.classes
    ((1347, 1, 8, 8), (450, 1, 8, 8), 10)
    """
    name = os.fspath(name)
    folder = folder if folder is not None else os.environ.get("JACPOT_DATA") or None
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        arrays = {"X": bunch.images, "y": bunch.target}
        return from_arrays("digits", arrays, "scikit-learn")
    if name in NAMES:
        found = sources.find(name, None if folder is None else Path(folder))
        if isinstance(found, Path):
            return from_arrays(name, read_npz(found), str(found))
        arrays, source = found
        return from_arrays(name, arrays, source)
    path = Path(name).expanduser()
    if path.suffix != ".npz":
        raise ValueError(
            f"data: expected one of {', '.join(NAMES)} or the path of an .npz file, got {name!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    return from_arrays(path.stem, read_npz(path), str(path))


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the four arrays (or ``X`` and ``y``) of an ``.npz`` file, unpickling nothing."""
    try:
        # np.load leaves a file open that it opened and could not read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            held = set(archive.files)
            wanted = next(
                (
                    w
                    for w in (("x_train", "y_train", "x_test", "y_test"), ("X", "y"))
                    if {*w} <= held
                ),
                None,
            )
            if wanted is None:
                raise ValueError(
                    f"{path}: expected the arrays x_train, y_train, x_test, y_test, or X, y; "
                    f"it holds {', '.join(sorted(held)) or 'nothing'}"
                )
            return {key: _read_array(archive, key, path) for key in wanted}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    except ValueError as error:
        # np.load takes anything that is not a zip archive for a pickle.
        if "pickle" in str(error):
            raise ValueError(f"{path}: not an .npz file") from error
        raise


def _read_array(archive: Any, key: str, path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = archive[key]
    except (ValueError, zlib.error, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = "it holds Python objects" if "Object arrays" in str(error) else str(error)
        raise ValueError(f"{path}: array {key!r} cannot be read: {reason}") from error
    return array


def from_arrays(name: str, arrays: dict[str, NDArray[Any]], source: str) -> Dataset:
    """Check arrays and bring them into the layout of `Dataset`.

    Parameters
    ----------
    name, source
        As in `Dataset`; ``source`` begins every error message.
    arrays
        ``x_train, y_train, x_test, y_test``, or ``X, y``.

    Returns
    -------
    Dataset
    """
    pairs = [("x_train", "y_train"), ("x_test", "y_test")] if "x_train" in arrays else [("X", "y")]
    inputs, targets = [], []
    for x_key, y_key in pairs:
        inputs.append(_inputs(arrays[x_key], f"{source}: array {x_key!r}"))
        targets.append(_targets(arrays[y_key], f"{source}: array {y_key!r}"))
        if len(inputs[-1]) != len(targets[-1]):
            raise ValueError(
                f"{source}: array {y_key!r} must have as many rows as {x_key!r} "
                f"({len(inputs[-1])}), got {len(targets[-1])}"
            )
    if len(pairs) == 1:
        train, test = _held_out(len(inputs[0]), source)
        inputs = [inputs[0][train], inputs[0][test]]
        targets = [targets[0][train], targets[0][test]]
    else:
        for (train_key, test_key), held in zip(
            zip(*pairs, strict=True), (inputs, targets), strict=True
        ):
            if held[0].shape[1:] != held[1].shape[1:] or held[0].dtype.kind != held[1].dtype.kind:
                raise ValueError(
                    f"{source}: arrays {train_key!r} and {test_key!r} must agree but for their "
                    f"number of rows, got {_say(held[0])} and {_say(held[1])}"
                )
    classes = None if targets[0].ndim == 2 else _classes(targets, source, pairs[0][1])
    return Dataset(name, inputs[0], targets[0], inputs[1], targets[1], classes, source)


def _inputs(x: NDArray[Any], where: str) -> NDArray[Any]:
    """Check inputs; return them as ``(N, D)`` or ``(N, C, H, W)``."""
    if x.dtype.kind not in "uif":
        raise ValueError(f"{where} must hold real numbers, got dtype {x.dtype}")
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"{where} must have shape (N, features), (N, height, width), (N, height, width, "
            f"channels) or (N, channels, height, width), got {x.shape}"
        )
    if x.size == 0:
        raise ValueError(f"{where} is empty: shape {x.shape}")
    _require_finite(x, where)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _targets(y: NDArray[Any], where: str) -> NDArray[Any]:
    """Check targets; return labels ``(N,)`` as int64 or floats ``(N, K)`` as float64."""
    if y.dtype.kind in "ui":
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            raise ValueError(
                f"{where} must hold one integer label per example, got shape {y.shape}"
            )
        return y.astype(np.int64)
    if y.dtype.kind != "f":
        raise ValueError(
            f"{where} must hold integer labels or float regression targets, got dtype {y.dtype}"
        )
    if y.ndim not in (1, 2) or y.size == 0:
        raise ValueError(f"{where} must have shape (N,) or (N, outputs), not empty, got {y.shape}")
    _require_finite(y, where)
    return y.reshape(len(y), -1).astype(np.float64)


def _classes(labels: list[NDArray[Any]], source: str, key: str) -> int:
    """Count the classes, after checking that the labels are ``0..C-1``."""
    lowest = min(int(part.min()) for part in labels)
    highest = max(int(part.max()) for part in labels)
    missing = sorted(set(range(max(highest, 1) + 1)) - set(np.unique(labels[0]).tolist()))
    if lowest < 0 or missing:
        problem = (
            f"the lowest is {lowest}" if lowest < 0 else f"no training example has {missing[0]}"
        )
        raise ValueError(
            f"{source}: array {key!r}: labels must be 0..C-1 with every class among the training "
            f"examples, but {problem} (numpy.unique(labels, return_inverse=True) renumbers)"
        )
    return highest + 1


def _held_out(count: int, source: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the training and of the test set, for data that come in one piece."""
    if count < 4:
        raise ValueError(
            f"{source}: at least 4 examples are needed to split off a test set, got {count}"
        )
    order = np.random.default_rng(TEST_SEED).permutation(count)
    held = -(-count * 25 // 100)
    return np.sort(order[held:]), np.sort(order[:held])


def _require_finite(array: NDArray[Any], where: str) -> None:
    if array.dtype.kind != "f":
        return
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(str(int(i)) for i in bad[0])
        raise ValueError(
            f"{where} must be finite, got {len(bad)} NaN or infinite value(s), "
            f"the first at [{place}]"
        )


def _say(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"
