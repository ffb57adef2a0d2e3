"""The compiled extension: loads it and says how it was built. The only module that imports it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

__all__ = ["build_info", "core", "cuda", "empty", "isa", "on_cuda", "queue", "settle", "threads"]

LARGE_BYTES = 4 << 20  # from where on the system's small pages cost more than writing to them


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


def empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Give an uninitialised tensor that is about to be written, on huge pages where it is large."""
    tensor = like.new_empty(shape)
    if tensor.nbytes > LARGE_BYTES and not tensor.is_cuda:
        core.prefer_huge_pages(tensor)
    return tensor


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
