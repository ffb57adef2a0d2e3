"""Dense systems: conjugate gradients, Cholesky and a path of ridges against their peers.

    python bench/bench_solve.py [--quick] [--json FILE]

Peers: SciPy (cg, cho_factor), and linear_operator's linear_cg where it is installed.
"""

from __future__ import annotations

import warnings

import numpy
import scipy.linalg
import scipy.sparse.linalg
import torch
from harness import Report, parser

import jacpot
from jacpot.linalg import solve_path


def kernel(size: int, dtype: torch.dtype) -> torch.Tensor:
    points = torch.rand(size, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.exp(-torch.cdist(points, points)).to(dtype)


def conjugate_gradients(report: Report, size: int) -> None:
    """Time the same number of iterations everywhere, so that stopping rules do not matter."""
    iterations, ridge = 100, 1e-4
    a = kernel(size, torch.float32) + ridge * torch.eye(size)
    b = torch.randn(size, generator=torch.Generator().manual_seed(1))
    array, right = a.numpy(), b.numpy()

    def ours():
        options = {"method": "cg", "tol": 1e-14, "max_iter": iterations}
        return jacpot.solve(a, b, **options).x

    def scipy_cg():
        return scipy.sparse.linalg.cg(array, right, rtol=1e-14, maxiter=iterations)[0]

    contenders = {"jacpot": ours, "scipy cg": scipy_cg}
    try:
        from linear_operator.utils.linear_cg import linear_cg
    except ImportError:
        pass
    else:

        def gpytorch_cg():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return linear_cg(
                    a.matmul, b[:, None], tolerance=1e-14, max_iter=iterations,
                    max_tridiag_iter=0, stop_updating_after=1e-14,
                )[:, 0]  # fmt: skip

        contenders["linear_cg"] = gpytorch_cg
    report.compare(f"CG, {size} x {size}, {iterations} iterations", contenders, agree=None)


def direct(report: Report, size: int) -> None:
    a, ridge = kernel(size, torch.float64), 1e-2
    b = torch.randn(size, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    array, right, eye = a.numpy(), b.numpy(), numpy.eye(size)

    def cholesky(value: float) -> numpy.ndarray:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(array + value * eye), right)

    report.compare(
        f"Cholesky, {size} x {size}, 10 right-hand sides, residual 1e-10",
        {
            "jacpot": lambda: jacpot.solve(a, b, damping=ridge, tol=1e-10).raise_if_failed().x,
            "scipy cholesky": lambda: cholesky(ridge),
        },
        tolerance=1e-7,
        min_rounds=3,
    )
    ridges = numpy.logspace(-2, 2, 20)

    def path() -> list[torch.Tensor]:
        return [s.raise_if_failed().x for s in solve_path(a, b, ridges, tol=1e-8)]

    report.compare(
        f"path of 20 ridges, {size} x {size}, 10 right-hand sides, residual 1e-8",
        {"jacpot": path, "scipy cholesky": lambda: [cholesky(ridge) for ridge in ridges]},
        tolerance=1e-5,
        min_rounds=1,
        budget=1.0,
    )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("Dense systems")
    conjugate_gradients(report, 300 if arguments.quick else 1000)
    direct(report, 500 if arguments.quick else 4000)
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
