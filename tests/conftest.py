"""What every test shares: Hypothesis profiles and the instruction sets of this machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend_streams
import pytest
import torch
from hypothesis import HealthCheck, settings
from pretend_gpu import PretendGpu, PretendKernels

from jacpot import _backend

_quiet = [
    HealthCheck.too_slow,
    HealthCheck.function_scoped_fixture,
    HealthCheck.differing_executors,
]
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=_quiet)
settings.register_profile("sanitizer", deadline=None, max_examples=15, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=_backend.core.build_info()["isas_supported"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the kernels of every instruction set that this machine has."""
    with _backend.isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def cuda_emulator() -> Any:
    """Provide the CUDA bindings over kernels that run on the CPU (csrc/common/cuda_emulator.hpp).

    That checks the kernels' logic on any machine; the hardware is checked by tests that need a GPU.
    """
    built = Path(__file__).parents[1] / "build" / "emulator"
    folder = Path(os.environ.get("JACPOT_CUDA_EMULATOR", built))
    found = sorted(folder.glob("_cuda_emulator*.so"))
    if not found:
        pytest.skip(f"no CUDA emulator in {folder}: run `make emulator`")
    spec = importlib.util.spec_from_file_location("_cuda_emulator", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def emulated_cuda(
    request: pytest.FixtureRequest, cuda_emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Let CPU tensors take the way of CUDA tensors, with threads taking turns in this order.

    A missing barrier shows as a difference between the orders. The device is small, so that small
    problems take many tiles and blocks.
    """
    order = ["forward", "reverse", "shuffled"].index(request.param)
    cuda_emulator.configure(shared_bytes=48 * 1024, multiprocessors=2, order=order)
    monkeypatch.setattr(_backend, "cuda", lambda: cuda_emulator)
    monkeypatch.setattr(_backend, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(_backend, "queue", lambda tensor: (0, 0))
    return cuda_emulator


def why_no_gpu() -> str | None:
    """Say why nothing can run on a GPU here; None where it can."""
    if _backend.build_info()["cuda_built"] is None:
        return "this build has no CUDA kernels: run `make test-cuda` where nvcc and a GPU are"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU, or was built without CUDA"
    return None


on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)


def _pretend(request: pytest.FixtureRequest) -> PretendGpu:
    """Let the device `cuda` exist, with the emulator's kernels (helpers/pretend_gpu.py)."""
    emulator = request.getfixturevalue("cuda_emulator")
    emulator.configure(shared_bytes=164 * 1024, multiprocessors=4, order=0)
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(_backend, "cuda", lambda: PretendKernels(emulator))
    patch.setattr(_backend, "queue", lambda tensor: (0, 0))
    patch.setattr(torch.cuda, "get_rng_state", lambda device=0: None)
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device=0: None)
    for name in ("Stream", "stream", "current_stream"):
        patch.setattr(torch.cuda, name, getattr(pretend_streams, name))
    patch.setattr(torch.cuda, "CUDAGraph", _refuse)
    patch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
    memory = SimpleNamespace(total_memory=8 << 30)
    patch.setattr(torch.cuda, "get_device_properties", lambda device=0: memory)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of two libraries that wait for one another
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    return PretendGpu()


def _refuse() -> None:
    raise RuntimeError("a pretended GPU has no graphs")


def _cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    # For those who write tests of GPUs and have none.
    if os.environ.get("JACPOT_TEST_CUDA") == "pretend":
        with _pretend(request):
            yield torch.device("cuda")
        return
    yield from _real()


def _real() -> Iterator[torch.device]:
    if (reason := why_no_gpu()) is not None:
        pytest.skip(reason)
    # What is compared with the CPU must be float32 there, too.
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield torch.device("cuda", 0)
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.synchronize()  # a kernel that failed fails the test that launched it


@pytest.fixture(params=[on_gpu])
def real_gpu() -> Iterator[torch.device]:
    """Run the test on a GPU: what it is about cannot be pretended."""
    yield from _real()


@pytest.fixture(params=[*_backend.core.build_info()["isas_supported"], on_gpu])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test on the CPU with the kernels of every instruction set, and on a GPU."""
    if request.param == "cuda":
        yield from _cuda(request)
        return
    with _backend.isa(request.param):
        yield torch.device("cpu")


@pytest.fixture(params=["cpu", on_gpu])
def any_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test on the CPU, as it comes, and on a GPU."""
    yield from _cuda(request) if request.param == "cuda" else iter([torch.device("cpu")])


@pytest.fixture(params=["cpu", on_gpu])
def real_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test on the CPU and on a GPU, for what looks at memory: that cannot be pretended."""
    yield from _real() if request.param == "cuda" else iter([torch.device("cpu")])


@pytest.fixture(params=["pretended", on_gpu])
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test on a pretended GPU, which refuses what a real one refuses, and on a real one."""
    if request.param == "cuda":
        yield from _cuda(request)
        return
    with _pretend(request):
        yield torch.device("cuda")
