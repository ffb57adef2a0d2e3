"""Everything that needs a GPU, the most important first, for a machine rented by the minute.

    python tools/gpu_session.py --out runs/gpu --minutes 25

Where one command may take less than everything, the same one again goes on with the stages that
are left: how each of them ended is kept beside the build. ``--again`` begins anew.

Builds with CUDA for the GPU at hand, in a tree of links that leaves an installation alone, and then
runs the tests marked ``cuda``, the benchmarks, and the sanitizers. Each stage has a time limit of
its own, and all of them share the minutes given. What is printed goes to ``session.log`` at once,
figures go to one JSON file for each benchmark as they come: nothing is lost when time runs out, in
this script or around it. A stage that fails does not keep the others from running, but for the
build.

It uses the Python that runs it, with what is named in NEEDED in it, and fetches nothing. Where
something is missing, the GPU too, one line says what. With ``--architectures`` it builds without a
GPU, and says then that there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda"
SITE = BUILD / "site"
DONE = BUILD / "session.json"
NEEDED = ("torch", "pybind11", "numpy", "scipy", "safetensors", "rich", "pytest", "hypothesis")
NEEDED += ("pytest_timeout",)
NO_GPU = "PyTorch sees no GPU: nothing more can be done here"
TOOLS = ("cmake", "ninja", "nvcc", "c++")
RUN = [sys.executable, str(ROOT / "tools" / "run_from.py"), str(SITE), "-m"]


@dataclass
class Stage:
    """A command, and how long it may take."""

    name: str
    seconds: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    essential: bool = False


def bench(name: str, script: str, seconds: float, out: Path, *arguments: str) -> Stage:
    """A benchmark that writes its figures as they come."""
    command = [*RUN, script, "--device", "cuda", "--json", str(out / f"{name}.json"), *arguments]
    return Stage(f"bench-{name}", seconds, [command], {"PYTHONPATH": str(ROOT / "bench")})


def sanitizer(tool: str, seconds: float) -> Stage:
    """The tests of the kernels under a tool that slows them down a hundredfold: few examples."""
    files = ["tests/core/test_devices.py", *sorted(map(str, ROOT.glob("tests/ops/test_*.py")))]
    prefix = f"compute-sanitizer --tool {tool} --error-exitcode 1 --report-api-errors no".split()
    # Without PyTorch's cache every tensor is an allocation whose ends are known; then nothing can
    # be recorded into a graph.
    environment = {"HYPOTHESIS_PROFILE": "sanitizer", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    select = ["-m", "cuda", "-k", "not captured and not opcheck and not well_formed"]
    return Stage(tool, seconds, [[*prefix, *pytest(*select, *files)]], environment)


def pytest(*arguments: str) -> list[str]:
    """Pytest with the plug-ins that the suite needs and no others."""
    plugins = ["-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider"]
    options = ["-q", "--timeout", "280", "--continue-on-collection-errors"]
    return [*RUN, "pytest", *plugins, *options, *arguments]


def stages(out: Path, architectures: str) -> Iterator[Stage]:
    """What is done, in this order."""
    configure = ["cmake", "--preset", "cuda", f"-DPython_EXECUTABLE={sys.executable}"]
    # Other compilers than ours may warn of other things.
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", "-DJACPOT_WERROR=OFF"]
    compile_all = ["cmake", "--build", "--preset", "cuda", "--parallel", str(os.cpu_count())]
    yield Stage("build", 500, [configure, compile_all], essential=True)
    yield Stage("hello", 90, [[*RUN, "gpu_hello"]], {"PYTHONPATH": str(ROOT / "tools")})
    several = ["-p", "xdist.plugin", "-n", "6"] if importlib.util.find_spec("xdist") else []
    yield Stage("tests", 400, [pytest(*several, "-m", "cuda", "tests")])
    yield bench("sparse", "bench_cuda", 200, out, "--case", "dense", "--case", "sparse")
    yield bench("gram", "bench_cuda", 100, out, "--case", "gram", "--case", "solve")
    yield bench("jacobian", "bench_cuda", 60, out, "--case", "jacobian")
    yield sanitizer("memcheck", 200)
    yield bench("resnet", "bench_cuda", 200, out, "--case", "resnet")
    yield sanitizer("racecheck", 200)
    yield bench("ntk", "bench_ntk", 120, out, "--budget", "3")
    yield bench("training", "bench_sparse_training", 60, out)


def links() -> None:
    """Lay the package out with the extension that was built."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "python" / "jacpot",
        SITE / "jacpot",
        copy_function=lambda source, to: os.symlink(source, to),
        ignore=shutil.ignore_patterns("_core*.so", "__pycache__"),
    )
    for extension in BUILD.glob("_core*.so"):
        (SITE / "jacpot" / extension.name).symlink_to(extension)


def search_path() -> str:
    """Where programs are looked for: beside this Python too, and where CUDA is installed."""
    known = os.environ.get("PATH", os.defpath)
    return os.pathsep.join([known, str(Path(sys.executable).parent), "/usr/local/cuda/bin"])


def missing() -> str | None:
    """Say what the machine lacks, or None."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    lacking += [name for name in TOOLS if shutil.which(name, path=search_path()) is None]
    return f"this machine lacks {', '.join(lacking)}" if lacking else None


def capability() -> str | None:
    """Give the GPU's architecture as CMake names it; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def run(stage: Stage, seconds: float, log: TextIO) -> str:
    """Run a stage within its time, and say how it ended."""
    variables = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # their warnings are errors here
    variables["PATH"] = search_path()
    end = time.monotonic() + seconds
    for command in stage.commands:
        if shutil.which(command[0], path=variables["PATH"]) is None:
            return f"no {Path(command[0]).name}"
        # A group of its own, so that nothing of it is left when its time is up.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        left = max(1.0, end - time.monotonic())
        timer = threading.Timer(left, kill_group, (process.pid,))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            tell(line.rstrip("\n"), log)
        code = process.wait()
        timer.cancel()
        if code != 0:
            return "out of time" if code == -signal.SIGKILL else f"failed ({code})"
    return "ok"


def kill_group(process: int) -> None:
    """End a process and what it has started, unless they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def done() -> dict[str, str]:
    """Say how the stages of the commands before ended, those that had their whole time."""
    try:
        return dict(json.loads(DONE.read_text()))
    except (OSError, ValueError):
        return {}


def tell(line: str, log: TextIO) -> None:
    """Say something where it is seen at once, and where it stays."""
    print(line, flush=True)
    print(line, file=log, flush=True)


def main() -> int:
    """Run the stages until the minutes are over."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    options.add_argument("--minutes", type=float, default=25.0, help="for everything together")
    options.add_argument("--architectures", help="as CMake names them; default: the GPU's")
    options.add_argument("--only", nargs="+", help="stages by name, in their own order")
    options.add_argument("--again", action="store_true", help="do what is done already, too")
    arguments = options.parse_args()
    reason, gpu = missing(), None
    if reason is None:
        gpu = capability()
        reason = None if gpu or arguments.architectures else NO_GPU
    if reason is not None:
        print(reason)
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    summary, failed = [], False
    ended = {} if arguments.again else done()
    with (out / "session.log").open("a") as log:
        for stage in stages(out, arguments.architectures or gpu or ""):
            if arguments.only and stage.name not in arguments.only:
                continue
            # What has changed since is built again; that takes seconds where nothing has.
            if stage.name in ended and not stage.essential:
                summary.append(f"{stage.name:16} {ended[stage.name]:20} before")
                continue
            began = time.monotonic()
            seconds = min(stage.seconds, end - began)
            outcome = "left out: no time"
            if seconds > 5:
                tell(f"=== {stage.name}, at most {seconds:.0f} s", log)
                outcome = run(stage, seconds, log)
                if stage.name == "build" and outcome == "ok":
                    links()
                if outcome != "out of time" or seconds == stage.seconds:
                    ended[stage.name] = outcome
                    BUILD.mkdir(parents=True, exist_ok=True)
                    DONE.write_text(json.dumps(ended))
            summary.append(f"{stage.name:16} {outcome:20} {time.monotonic() - began:6.0f} s")
            tell(summary[-1], log)
            failed |= outcome != "ok"
            if stage.essential and outcome != "ok":
                break
            if gpu is None:
                tell(NO_GPU, log)
                failed = True
                break
        tell("=== " + "\n    ".join(summary), log)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
