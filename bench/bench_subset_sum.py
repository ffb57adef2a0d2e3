"""Subset sums of 397,000 weights, and a search in NumPy beside ours.

As many as a 784-500-10 network has (784 * 500 + 500 * 10). Pensia et al. 2020 report 21.5 hours
on 36 cores for that many with a mixed-integer solver, at n = 21 and epsilon = 0.01.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from harness import Report, parser
from rich.console import Console
from rich.table import Table

from jacpot import tickets

WEIGHTS = 397_000
EPSILON = 0.01


def problem(count: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of its own for each target, all uniform on [-1, 1]."""
    generator = torch.Generator().manual_seed(n)
    samples = torch.rand(count, n, generator=generator) * 2 - 1
    return samples, torch.rand(count, generator=generator) * 2 - 1


def numpy_search(samples: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Meet in the middle with np.sort and np.searchsorted: the sums found, (M,)."""
    n = samples.shape[1]
    halves = [samples[:, : n // 2].astype(float), samples[:, n // 2 :].astype(float)]
    sums = []
    for half in halves:
        subsets = (np.arange(2 ** half.shape[1])[:, None] >> np.arange(half.shape[1])) & 1
        sums.append(half @ subsets.T)
    left, right = sums[0], np.sort(sums[1], axis=1)
    found = np.empty(len(targets))
    for m, target in enumerate(targets.astype(float)):
        wanted = target - left[m]
        place = np.clip(np.searchsorted(right[m], wanted), 1, right.shape[1] - 1)
        below, above = right[m][place - 1], right[m][place]
        nearest = left[m] + np.where(wanted - below < above - wanted, below, above)
        found[m] = nearest[np.abs(nearest - target).argmin()]
    return found


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    weights = WEIGHTS // 100 if arguments.quick else WEIGHTS
    report = Report("Nearest subset sums, 500 targets")
    for n in (18, 21):
        samples, targets = problem(500, n)
        contenders = {
            "jacpot": lambda s=samples, t=targets: tickets.subset_sum(s, t).sums,
            "NumPy": lambda s=samples, t=targets: numpy_search(s.numpy(), t.numpy()),
        }
        report.compare(
            f"n={n}",
            contenders,
            agree=lambda a, b, t=targets: float(
                ((a - t).abs() - (torch.as_tensor(b) - t).abs()).abs().max()
            ),
            tolerance=1e-12,
        )
    report.show()
    table = Table(
        "n",
        "seconds",
        "us a weight",
        "failures",
        "share",
        "largest error",
        title=f"{weights:,} weights, epsilon {EPSILON}, {torch.get_num_threads()} threads",
    )
    for n in (18, 19, 20, 21):
        samples, targets = problem(weights, n)
        start = time.perf_counter()
        sums = tickets.subset_sum(samples, targets).sums
        seconds = time.perf_counter() - start
        error = (sums - targets).abs()
        failed = int((error > EPSILON).sum())
        row = {
            "case": f"{weights} weights, n={n}",
            "seconds": seconds,
            "failures": failed,
            "largest_error": float(error.max()),
        }
        report.rows.append(row)
        table.add_row(
            str(n),
            f"{seconds:.2f}",
            f"{seconds / weights * 1e6:.1f}",
            str(failed),
            f"{failed / weights:.2e}",
            f"{float(error.max()):.4f}",
        )
    Console(width=120).print(table)
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
