"""Compare contenders on the same inputs, alternately, in one process.

>>> report = Report("example")
>>> report.compare("N=256", {"ours": f, "peer": g}, agree=lambda a, b: max_error(a, b))
>>> report.show(); report.save("example.json")

The clock of a shared machine drifts by tens of percent within a minute, so contenders take
turns, call by call, and the ratio of their medians is the figure that means something.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import jacpot

__all__ = [
    "Report",
    "Timing",
    "alternate",
    "cuda_clock",
    "environment",
    "max_error",
    "on_gpu",
    "parser",
    "peak_above",
    "resident",
    "set_up",
    "wall_clock",
]


@dataclass
class Timing:
    """Seconds a call of one contender took, one per round."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


CACHE_BYTES = 256 << 20  # more than the L2 of any GPU covered

Clock = Callable[[Callable[[], Any]], float]


def wall_clock(call: Callable[[], Any]) -> float:
    """Time a call that has done its work when it returns."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


HOST_CLOCKS = 2_000_000  # of the GPU


@functools.cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")


def cuda_clock(call: Callable[[], Any]) -> float:
    """Time what a call puts on the current stream of the GPU, by events on that stream.

    The L2 cache is overwritten before, so that inputs come from memory as they would in a network.
    The GPU then waits until the host has had about a millisecond to launch: what is timed is the
    work on the device, not how long Python takes to ask for it.
    """
    _larger_than_l2().zero_()
    torch.cuda._sleep(HOST_CLOCKS)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    clock: Clock | None = None,
    budget: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Time the contenders in turns, after one warm-up call of each.

    Rounds go on until ``budget`` seconds have passed in all. A turn is one call; with ``settle``
    it is that many seconds of untimed calls, and then as many of timed ones. Calls of a few
    milliseconds need it: the threads of OpenBLAS and of OpenMP go on spinning for tens of them when
    their work is done, and would hold cores that the next contender counts on.
    """
    clock = clock or (cuda_clock if on_gpu() else wall_clock)
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_ in range(max_rounds):
            if round_ >= min_rounds and time.perf_counter() - start > budget:
                break
            for name, call in contenders.items():
                seconds[name] += _turn(call, clock, settle)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(name, times) for name, times in seconds.items()}


def _turn(call: Callable[[], Any], clock: Clock, settle: float) -> list[float]:
    settled = time.perf_counter() + settle
    while time.perf_counter() < settled:
        call()
    seconds = [clock(call)]
    while time.perf_counter() < settled + settle:
        seconds.append(clock(call))
    return seconds


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _flatten(item)]
    return [torch.as_tensor(value).detach()]


def max_error(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected entry; for (nests of) arrays."""
    worst = 0.0
    for a, b in zip(_flatten(actual), _flatten(expected), strict=True):
        if b.numel():
            scale = b.abs().max().item() or 1.0
            worst = max(worst, (a.to(b.dtype) - b).abs().max().item() / scale)
    return worst


def resident(field: str) -> float:
    """Give a field of this process' memory, ``VmRSS`` or ``VmHWM``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_above(call: Callable[[], Any]) -> float:
    """Run a call once; the peak of this process' memory above what it held before, in MiB."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return resident("VmHWM") - before


def environment() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "jacpot": jacpot.build_info(),
        "mkl": torch.backends.mkl.is_available(),
    }


@dataclass
class Report:
    """Collects comparisons; prints a table and writes JSON with the environment.

    With a ``path``, what is measured is written there at once, so that a crash loses nothing.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    def compare(
        self,
        case: str,
        contenders: Mapping[str, Callable[[], Any]],
        *,
        agree: Callable[[Any, Any], float] | None = max_error,
        tolerance: float = 1e-3,
        flops: float | None = None,
        **timing: Any,
    ) -> dict[str, Timing]:
        """Check that the contenders agree with the first one, then time them in turns.

        Parameters
        ----------
        case
            What the row is called.
        contenders
            By name; the first is ours, ratios are of the others over it.
        agree
            Error of a result against the first contender's; None skips the check.
        tolerance
            Largest error that passes.
        flops
            Useful operations of one call, for the rate in the table.
        timing
            Passed on to :func:`alternate`.

        Raises
        ------
        AssertionError
            If a contender disagrees.
        """
        names = list(contenders)
        errors: dict[str, float] = {}
        if agree is not None and len(names) > 1:
            ours = contenders[names[0]]()
            for name in names[1:]:
                errors[name] = agree(ours, contenders[name]())
                assert errors[name] <= tolerance, f"{case}: {name} differs by {errors[name]:.2e}"
        timings = alternate(contenders, **timing)
        ours_median = timings[names[0]].median
        self.rows.append(
            {
                "case": case,
                "median_seconds": {name: t.median for name, t in timings.items()},
                "spread": {name: t.spread for name, t in timings.items()},
                "rounds": len(timings[names[0]].seconds),
                "ratio": {name: timings[name].median / ours_median for name in names[1:]},
                "error": errors,
                "gflops": flops / ours_median / 1e9 if flops else None,
            }
        )
        self.keep()
        return timings

    def add(self, case: str, seconds: Mapping[str, float], note: str = "") -> None:
        """Take seconds that were measured elsewhere, and a note on what they mean."""
        self.rows.append(
            {
                "case": case,
                "median_seconds": dict(seconds),
                "ratio": {},
                "gflops": None,
                "note": note,
            }
        )
        self.keep()

    def keep(self) -> None:
        """Say what the last row is, and write all rows if there is a path."""
        row = self.rows[-1]
        said = [f"{name} {1e3 * t:.3f} ms" for name, t in row["median_seconds"].items()]
        said += [f"{ratio:.2f}x of {name}" for name, ratio in row["ratio"].items()]
        said += [row["note"]] if row.get("note") else []
        print(f"{row['case']}: {', '.join(said)}", flush=True)
        if self.path is not None:
            self.save(self.path)

    def show(self) -> None:
        """Print the medians in milliseconds and the ratios of the others to the first."""
        table = Table(title=self.title)
        names: list[str] = []
        for row in self.rows:
            names += [name for name in row["median_seconds"] if name not in names]
        table.add_column("case")
        for name in names:
            table.add_column(f"{name} [ms]", justify="right")
        for name in names[1:]:
            table.add_column(f"{name} / {names[0]}", justify="right")
        table.add_column("GF/s", justify="right")
        for row in self.rows:
            medians, ratios = row["median_seconds"], row["ratio"]
            table.add_row(
                row["case"],
                *(f"{medians[n] * 1e3:.3f}" if n in medians else "" for n in names),
                *(f"{ratios[n]:.2f}x" if n in ratios else "" for n in names[1:]),
                f"{row['gflops']:.0f}" if row["gflops"] else "",
            )
        Console(width=200).print(table)

    def save(self, path: str | Path) -> None:
        """Write the rows and the environment as JSON."""
        figures = {"title": self.title, "rows": self.rows, "environment": environment()}
        text = json.dumps(figures, indent=2, default=str)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")


def why_no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if jacpot.build_info()["cuda_built"] is None:
        return "this jacpot was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU, or was built without CUDA"
    return None


def on_gpu() -> bool:
    """Whether tensors are made on a GPU, as ``--device cuda`` asks for."""
    return torch.get_default_device().type == "cuda"


def set_up(arguments: argparse.Namespace) -> None:
    """Set threads and the device that inputs are made on; ends the script where there is none."""
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and (reason := why_no_gpu()) is not None:
        print(f"skipped: {reason}")
        raise SystemExit(0)
    if arguments.device != "cpu":  # what is the default already would only cost time
        torch.set_default_device(arguments.device)


def parser(description: str | None, device: str = "cpu") -> argparse.ArgumentParser:
    """Options that every benchmark takes: ``--json``, ``--threads``, ``--quick``, ``--device``."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, help="write the figures and the environment here")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--quick", action="store_true", help="small sizes, a few rounds")
    options.add_argument(
        "--device", choices=["cpu", "cuda"], default=device, help="CUDA is timed by its events"
    )
    return options
