from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import jacpot
from jacpot import _backend


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info_describes_the_build_and_the_machine():
    info = jacpot.build_info()
    assert set(info["isas_supported"]) <= set(info["isas_built"])
    assert info["isas_built"][0] == "baseline"
    assert info["isa"] == os.environ.get("JACPOT_ISA", info["isas_supported"][-1])
    assert info["threads"] == torch.get_num_threads()
    assert info["torch"] == torch.__version__
    assert info["blas"] in {"torch", "scipy"}
    assert info["version"].count(".") == 2


@pytest.mark.parametrize("name", jacpot.build_info()["isas_supported"])
def test_environment_variable_forces_an_isa(name):
    done = run_python("import jacpot; print(jacpot.build_info()['isa'])", JACPOT_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_unknown_isa_is_refused_at_import():
    done = run_python("import jacpot", JACPOT_ISA="z80")
    assert done.returncode != 0
    assert "JACPOT_ISA='z80' is not available; this machine supports baseline" in done.stderr


def test_isa_context_restores_what_was_active():
    before = jacpot.build_info()["isa"]
    with _backend.isa("baseline"):
        assert jacpot.build_info()["isa"] == "baseline"
    assert jacpot.build_info()["isa"] == before
    with pytest.raises(ValueError, match="'z80' is not available"), _backend.isa("z80"):
        pass


def test_extension_links_neither_torch_nor_openmp():
    """A wheel must serve any torch, and bring no second OpenMP runtime into the process."""
    libraries = subprocess.run(
        ["ldd", _backend.core.__file__], capture_output=True, text=True, check=True
    ).stdout
    for name in ("torch", "c10", "gomp", "libomp", "iomp", "mkl", "blas"):
        assert name not in libraries


def test_tasks_run_on_torchs_own_openmp_runtime():
    runtime = jacpot.build_info()["thread_runtime"]
    assert runtime == "std::thread" or "omp" in runtime
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    if any("torch" in path for path in loaded):
        assert "torch" in runtime
