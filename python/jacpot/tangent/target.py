"""Where a streamed result goes: a tensor, an array, a memory-mapped file or a zarr array."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from jacpot.tangent.journal import checksum
from jacpot.tangent.offload import HostCopies

__all__ = ["Place", "Target", "leaves_gpu"]

Place: TypeAlias = tuple[tuple[slice, ...], tuple[int, ...]]  # where; order of the block's axes


def leaves_gpu(device: torch.device, out: Any) -> bool:
    """Whether what is computed on a device goes from a GPU to the host, into ``out``."""
    return device.type == "cuda" and out is not None and not getattr(out, "is_cuda", False)


class Target:
    """An array of a given shape and dtype that blocks are written into.

    Parameters
    ----------
    out
        A tensor, a NumPy array or memmap, anything with ``shape``, ``dtype`` and assignment to
        slices (zarr, h5py), the path of a ``.npy`` file that is made or continued, or None for a
        new tensor.
    shape, dtype
        What it must have.
    device
        Of a new tensor.

    Attributes
    ----------
    array
        What was given, or made.
    journal
        The file in which finished blocks are named; None if the array does not outlive the process.

    Raises
    ------
    TypeError, ValueError
        If the array has another dtype or shape.
    """

    def __init__(
        self,
        out: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.journal: Path | None = None
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        elif isinstance(out, str | os.PathLike):
            out = _npy(Path(out), shape, dtype)
        if (
            not hasattr(out, "shape")
            or not hasattr(out, "dtype")
            or not hasattr(out, "__setitem__")
        ):
            raise TypeError(
                "argument 'out' must be a tensor, an array or the path of a .npy file, got "
                f"{type(out).__name__}"
            )
        if tuple(out.shape) != shape:
            raise ValueError(f"argument 'out' must have shape {shape}, got {tuple(out.shape)}")
        wanted = dtype if isinstance(out, Tensor) else _numpy_dtype(dtype)
        if out.dtype != wanted:
            raise TypeError(f"argument 'out' must be {wanted}, got {out.dtype}")
        if not getattr(getattr(out, "flags", None), "writeable", True):
            raise ValueError("argument 'out' must be writeable, got a read-only array")
        if isinstance(out, Tensor) and not _is_writeable(out):
            raise ValueError(
                "argument 'out' must be a tensor to write to, got one that requires gradients, was "
                "made in inference mode or is on the meta device"
            )
        self.array = out
        self._copies: HostCopies | None = None
        place = _place(out)
        if place is not None:
            self.journal = place.with_name(place.name + ".jacpot-journal")

    def write(self, block: Tensor, places: Sequence[Place], done: Callable[[int], None]) -> None:
        """Write a block to its places and call ``done``: now, or later if it leaves a GPU.

        ``done`` is given the block's checksum, where there is a journal to keep it.
        """

        def store(values: Tensor) -> None:
            for index, order in places:
                part = values.permute(order)
                self.array[index] = part if isinstance(self.array, Tensor) else part.cpu().numpy()
            done(0 if self.journal is None else checksum(values.cpu().numpy()))

        if not leaves_gpu(block.device, self.array):
            store(block)
            return
        if self._copies is None:
            self._copies = HostCopies(block.device)
        self._copies.start(block, store)

    def holds(self, places: Sequence[Place], found: int) -> bool:
        """Whether the block of this checksum is at all its places."""
        same = all(
            checksum(numpy.asarray(self.array[index]).transpose(numpy.argsort(order))) == found
            for index, order in places
        )
        self._release()
        return same

    def finish(self) -> None:
        """Write what is still on its way from a GPU."""
        if self._copies is not None:
            self._copies.finish()

    def flush(self) -> None:
        """Make what was written durable."""
        flush = getattr(self.array, "flush", None)
        if flush is not None:
            flush()
        self._release()

    def _release(self) -> None:
        """Give a mapped file's memory back."""
        # Only of a mapping that is shared with the file: a private one would lose what was written.
        shared = getattr(self.array, "mode", None) in ("r+", "w+")
        mapped = getattr(self.array, "_mmap", None)
        if shared and mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _is_writeable(out: Tensor) -> bool:
    frozen = out.is_inference() and not torch.is_inference_mode_enabled()
    return not (out.requires_grad or frozen or out.is_meta)


def _numpy_dtype(dtype: torch.dtype) -> numpy.dtype[Any]:
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def _npy(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Open a file that is there, or make one."""
    if path.suffix != ".npy":
        raise ValueError(f"argument 'out' must be the path of a .npy file, got {str(path)!r}")
    if path.exists():
        try:
            return numpy.lib.format.open_memmap(path, "r+")
        except ValueError as error:
            raise ValueError(
                f"argument 'out' must be the path of a .npy file, got {str(path)!r}: {error}"
            ) from error
    try:
        array = numpy.lib.format.open_memmap(path, "w+", dtype=_numpy_dtype(dtype), shape=shape)
        if hasattr(os, "posix_fallocate"):
            # A disk that is too full says so now; a page that has no room on it later ends the
            # process.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return array


def _place(out: Any) -> Path | None:
    """Where an array lies on disk, if it does."""
    if isinstance(out, numpy.memmap):
        return None if out.filename is None else Path(os.fspath(out.filename))
    store = getattr(out, "store", None)  # zarr: a store with a root (3) or a path (2)
    root = getattr(store, "root", getattr(store, "path", None))
    if not isinstance(root, str | os.PathLike):
        return None
    inner = str(getattr(out, "path", "")).strip("/")
    base = Path(root)
    return base.with_name("-".join([base.name, *inner.split("/")])) if inner else base
