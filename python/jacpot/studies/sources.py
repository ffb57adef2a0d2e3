"""Where the named data sets lie: a folder of the user's, or a checked download."""

from __future__ import annotations

import gzip
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["find"]

Arrays = dict[str, NDArray[Any]]

# The four files of MNIST and of the sets made after its pattern.
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Subfolders in which the IDX files may lie: torchvision's layout, and one folder for each set.
# The two sets share their file names, so only MNIST's may lie in the folder itself.
IDX_FOLDERS = {
    "mnist": ("", "mnist", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"),
}
# Base address, and the published MD5 of each gzipped file.
IDX_DOWNLOADS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "x_train": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "y_train": "d53e105ee54ea40749a09fcbcd1e9432",
            "x_test": "9fb629c4189551a2d022fa330f9573f3",
            "y_test": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "x_train": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "y_train": "25c81989df183df01b3e8a0aad5dffbe",
            "x_test": "bef4ecab320f06d8554ea6380940ec79",
            "y_test": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_FOLDERS = ("", "cifar10", "cifar-10-batches-bin")
CIFAR_RECORD = 1 + 3 * 32 * 32  # one label byte, then the three colour planes


def find(name: str, folder: Path | None) -> Path | tuple[Arrays, str]:
    """Find a named data set in ``folder``, or download it.

    Parameters
    ----------
    name
        ``mnist``, ``fashion-mnist``, ``cifar10`` or ``california``.
    folder
        A folder to look into first; None for none.

    Returns
    -------
    Path or tuple
        The ``.npz`` file, or the arrays and the place they were read from.

    Raises
    ------
    FileNotFoundError
        If ``folder`` does not exist, or lacks the data and they cannot be downloaded.
    ValueError
        If a file is damaged.
    """
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"JACPOT_DATA: there is no folder {folder}")
        held = _in_folder(name, folder)
        if held is not None:
            return held
    try:
        return _download(name)
    except Exception as error:  # whatever keeps a download from arriving, the cure is the same
        raise FileNotFoundError(_advice(name, folder, error)) from error


def _in_folder(name: str, folder: Path) -> Path | tuple[Arrays, str] | None:
    exact = folder / f"{name}.npz"
    if exact.is_file():
        return exact
    parts = sorted(folder.glob(f"{name}_*.npz"))  # a part of the whole set, say cifar10_20k.npz
    if parts:
        return parts[0]
    for sub in IDX_FOLDERS.get(name, ()):
        files = {key: _plain_or_gzipped(folder / sub / file) for key, file in IDX_FILES.items()}
        if all(files.values()):
            return {key: read_idx(file) for key, file in files.items() if file}, str(folder / sub)
    if name == "cifar10":
        for sub in CIFAR_FOLDERS:
            if all((folder / sub / file).is_file() for file in CIFAR_TRAIN + CIFAR_TEST):
                return read_cifar(folder / sub), str(folder / sub)
    return None


def _plain_or_gzipped(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped or not.

    Its header is two zero bytes, a type code (8 means bytes), the number of dimensions, then each
    dimension as a big-endian 32-bit integer.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: not an IDX file of bytes")
    shape = tuple(np.frombuffer(content, ">i4", content[3], 4).tolist())
    body = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {body.size} bytes where its header promises shape {shape}")
    return body.reshape(shape)


def read_cifar(folder: Path) -> Arrays:
    """Read the binary release of CIFAR-10: six files of records (label, red, green, blue)."""

    def records(files: tuple[str, ...]) -> NDArray[np.uint8]:
        parts = []
        for file in files:
            part = np.fromfile(folder / file, np.uint8)
            if part.size == 0 or part.size % CIFAR_RECORD:
                raise ValueError(
                    f"{folder / file}: {part.size} bytes, not a multiple of {CIFAR_RECORD}"
                )
            parts.append(part.reshape(-1, CIFAR_RECORD))
        return np.concatenate(parts)

    train, test = records(CIFAR_TRAIN), records(CIFAR_TEST)
    return {
        "x_train": train[:, 1:].reshape(-1, 3, 32, 32),
        "y_train": train[:, 0],
        "x_test": test[:, 1:].reshape(-1, 3, 32, 32),
        "y_test": test[:, 0],
    }


def _download(name: str) -> tuple[Arrays, str]:
    import pooch

    cache = Path(pooch.os_cache("jacpot"))
    if name in IDX_DOWNLOADS:
        address, hashes = IDX_DOWNLOADS[name]
        return {
            key: read_idx(_fetch(f"{address}{IDX_FILES[key]}.gz", md5, cache / name))
            for key, md5 in hashes.items()
        }, address
    if name == "cifar10":
        archive = _fetch(CIFAR_ADDRESS, CIFAR_MD5, cache)
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive) as tar:
            for file in CIFAR_TRAIN + CIFAR_TEST:
                member = tar.extractfile(f"cifar-10-batches-bin/{file}")
                assert member is not None  # the archive's hash was checked
                (Path(scratch) / file).write_bytes(member.read())
            return read_cifar(Path(scratch)), CIFAR_ADDRESS
    from sklearn.datasets import fetch_california_housing

    x, y = fetch_california_housing(data_home=str(cache), return_X_y=True)  # checks a SHA-256
    return {"X": x, "y": y}, "scikit-learn's fetch_california_housing"


def _fetch(address: str, md5: str, cache: Path) -> Path:
    import pooch

    return Path(
        pooch.retrieve(address, f"md5:{md5}", fname=address.rsplit("/", 1)[-1], path=str(cache))
    )


def _advice(name: str, folder: Path | None, error: Exception) -> str:
    files = f"{name}.npz (arrays {'X, y' if name == 'california' else ', '.join(IDX_FILES)})"
    if name in IDX_FOLDERS:
        files += f" or the four files {', '.join(IDX_FILES.values())}, gzipped or not"
        if name == "fashion-mnist":
            files += f", in a subfolder {name}"
    elif name == "cifar10":
        files += f" or the binary release unpacked ({CIFAR_ADDRESS})"
    looked = f"The folder {folder} does not hold it" if folder else "JACPOT_DATA is not set"
    return (
        f"data {name!r} is not at hand. {looked}, and the download failed: "
        f"{type(error).__name__}: {error}.\n"
        f"Set JACPOT_DATA to a folder that holds {files}; or connect to the network and run the "
        f"command again; or use --data digits, which needs no download."
    )
