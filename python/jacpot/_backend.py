"""The compiled extension: loads it and says how it was built. The only module that imports it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy
import torch  # before the extension, which runs its tasks on the OpenMP runtime torch loads

try:
    from jacpot import _core as core
except ImportError as error:  # pragma: no cover - a broken installation
    raise ImportError(
        "jacpot's compiled extension could not be loaded. Install the package with "
        "`pip install .` (a C++20 compiler and CMake are needed), and import it from outside its "
        f"source folder. The loader said: {error}"
    ) from error

__all__ = [
    "build_info",
    "core",
    "cuda",
    "empty",
    "isa",
    "on_cuda",
    "queue",
    "release_memory",
    "settle",
    "threads",
]

LARGE_BYTES = 4 << 20  # from where on the system's small pages cost more than writing to them
NUMPY_DTYPES: dict[torch.dtype, numpy.dtype[Any]] = {
    torch.float32: numpy.dtype("f4"),
    torch.float64: numpy.dtype("f8"),
}


def threads() -> int:
    """Threads that a kernel may use: as many as PyTorch uses."""
    return torch.get_num_threads()


def cuda() -> Any:
    """Give the CUDA kernels.

    Raises
    ------
    NotImplementedError
        If the extension was built without them.
    """
    kernels = getattr(core, "cuda", None)
    if kernels is None:
        raise NotImplementedError(
            "this jacpot was built without CUDA: build it where nvcc is on PATH with "
            "`pip install . -C cmake.define.JACPOT_CUDA=ON`, or move the tensors to the CPU"
        )
    return kernels


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes the CUDA kernels."""
    return tensor.is_cuda


def queue(tensor: torch.Tensor) -> tuple[int, int]:
    """Number of a CUDA tensor's device, and the caller's current stream on it as an integer."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream


def settle(tensor: torch.Tensor) -> None:
    """Wait until what is about to be kept has been computed: other streams will read it, too.

    The wait is the caller's current stream's, on the device of one of the tensors.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


class Numbers(Protocol):
    """What has a dtype and a device: a tensor, or a block of a Jacobian."""

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""

    @property
    def device(self) -> torch.device:
        """Where the numbers lie."""


def empty(shape: tuple[int, ...], like: Numbers) -> torch.Tensor:
    """Give an uninitialised tensor that is about to be written.

    A large one on the CPU is on huge pages, and in memory that is kept for the next when it is
    freed: the system would clear it first, which can take longer than to compute what it holds.
    """
    on_host = like.device.type == "cpu" and like.dtype in NUMPY_DTYPES
    nbytes = math.prod(shape) * like.dtype.itemsize if on_host else 0
    if nbytes >= core.KEPT_BYTES:
        kept = core.kept_array(shape, NUMPY_DTYPES[like.dtype])
        if kept is not None:
            return torch.from_numpy(kept)
    if isinstance(like, torch.Tensor):
        tensor = like.new_empty(shape)  # like it, too, if it is of a kind of its own
    else:
        tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    if nbytes >= LARGE_BYTES:
        core.prefer_huge_pages(tensor)
    return tensor


def release_memory() -> None:
    """Give memory of freed results back to the system at once.

    Large results on the CPU, kernels and Jacobians of 16 MiB and more, and what is large of the
    memory in which they are computed, are kept when they are freed, up to 1 GiB, so that the next
    one is not written to pages that the system has to clear first. On Linux the system takes kept
    pages back by itself where it is short of memory (``MADV_FREE``), and nothing is kept elsewhere:
    this is for processes whose size is watched. What the C library's allocator holds back is given
    up, too.

    Examples
    --------
    >>> import jacpot
    >>> jacpot.release_memory()
    """
    core.return_free_memory()


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Use the kernels of one instruction set inside a ``with`` block.

    Parameters
    ----------
    name
        One of ``build_info()["isas_supported"]``.

    Raises
    ------
    ValueError
        If this machine or this build does not have it.
    """
    before = core.build_info()["isa"]
    if not core.force_isa(name):
        raise ValueError(
            f"argument 'name': instruction set {name!r} is not available; "
            f"this machine supports {', '.join(core.build_info()['isas_supported'])}"
        )
    try:
        yield
    finally:
        core.force_isa(before)


def build_info() -> dict[str, Any]:
    """How jacpot was built and what it runs on.

    Returns
    -------
    dict
        ``version``, ``compiler``, ``isas_built``, ``isas_supported``, ``isa`` (the one in use),
        ``cuda_built`` (toolkit version or None), ``cuda_architectures``, ``cuda_available``,
        ``threads``, ``thread_runtime``, ``blas`` (whose), ``python``, ``torch``, ``numpy``.

    Examples
    --------
    >>> import jacpot
    >>> info = jacpot.build_info()
    >>> info["isa"] in info["isas_supported"]
    True
    """
    info: dict[str, Any] = dict(core.build_info())
    info["cuda_available"] = info["cuda_built"] is not None and torch.cuda.is_available()
    info["threads"] = threads()
    info["python"] = platform.python_version()
    info["torch"] = torch.__version__
    info["numpy"] = numpy.__version__
    return info


if core.build_info()["blas"] == "none":
    from scipy.linalg import cython_blas

    core.set_blas_fallback(cython_blas.__pyx_capi__["sgemm"], cython_blas.__pyx_capi__["dgemm"])

_forced = os.environ.get("JACPOT_ISA", "")
if _forced and not core.force_isa(_forced):
    raise ImportError(
        f"JACPOT_ISA={_forced!r} is not available; "
        f"this machine supports {', '.join(core.build_info()['isas_supported'])}"
    )
