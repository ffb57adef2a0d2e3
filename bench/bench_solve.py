"""Dense systems: CG, MINRES, LSMR, Cholesky and a path of ridges against their peers.

    python bench/bench_solve.py [--quick] [--json FILE]

Peers: SciPy (cg, minres, lsmr, cho_factor; on a GPU torch's Cholesky), and linear_operator's
linear_cg where it is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy
import scipy.linalg
import scipy.sparse.linalg
import torch
from harness import Report, on_gpu, parser, set_up

import jacpot
from jacpot.linalg import solve_path


def kernel(size: int, dtype: torch.dtype) -> torch.Tensor:
    points = random(torch.rand, 0, size, 8)
    return torch.exp(-torch.cdist(points, points)).to(dtype)


def random(draw: Callable[..., torch.Tensor], seed: int, *shape: int) -> torch.Tensor:
    """Draw the same float64 numbers on every device."""
    options = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    return draw(*shape, dtype=torch.float64, **options).to(torch.get_default_device())


def conjugate_gradients(report: Report, size: int) -> None:
    """Time the same number of iterations everywhere, so that stopping rules do not matter."""
    iterations, ridge = 100, 1e-4
    a = kernel(size, torch.float32) + ridge * torch.eye(size)
    b = random(torch.randn, 1, size).float()

    def ours():
        options = {"method": "cg", "tol": 1e-14, "max_iter": iterations}
        return jacpot.solve(a, b, **options).x

    contenders = {"jacpot": ours}
    if not on_gpu():
        array, right = a.numpy(), b.numpy()
        contenders["scipy cg"] = lambda: scipy.sparse.linalg.cg(
            array, right, rtol=1e-14, maxiter=iterations
        )[0]
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
    # Each alone in its turn: what a program sees that uses one of them.
    report.compare(
        f"CG, {size} x {size}, {iterations} iterations", contenders, agree=None, settle=0.1
    )


def indefinite(report: Report, size: int) -> None:
    """Time the same number of MINRES's iterations, on eigenvalues of both signs."""
    if on_gpu():
        return  # there is no such method
    iterations = 100
    values = torch.logspace(0, -1, size, dtype=torch.float64)
    values[::2] *= -1
    basis = torch.linalg.qr(random(torch.randn, 0, size, size))[0]
    a = basis * values @ basis.T
    a = (a + a.T) / 2
    b = random(torch.randn, 1, size)
    options = {"method": "minres", "tol": 1e-14, "max_iter": iterations}
    array, right = a.numpy(), b.numpy()
    report.compare(
        f"MINRES, {size} x {size}, {iterations} iterations",
        {
            "jacpot": lambda: jacpot.solve(a, b, **options).x,
            "scipy minres": lambda: scipy.sparse.linalg.minres(
                array, right, rtol=1e-14, maxiter=iterations
            )[0],
        },
        tolerance=1e-6,
        settle=0.1,
    )


def least_squares(report: Report, size: int) -> None:
    """Time the same number of LSMR's iterations on a least-squares problem of condition 10."""
    iterations = 100
    values = torch.logspace(0, -1, size, dtype=torch.float64)
    basis = torch.linalg.qr(random(torch.randn, 0, 4 * size, size))[0]
    a = basis * values @ torch.linalg.qr(random(torch.randn, 1, size, size))[0]
    b = random(torch.randn, 2, 4 * size)
    options = {"method": "lsmr", "tol": 1e-14, "max_iter": iterations}
    contenders = {"jacpot": lambda: jacpot.solve(a, b, **options).x}
    if not on_gpu():
        array, right = a.numpy(), b.numpy()
        contenders["scipy lsmr"] = lambda: scipy.sparse.linalg.lsmr(
            array, right, atol=0.0, btol=0.0, conlim=0.0, maxiter=iterations
        )[0]
    report.compare(
        f"LSMR, {4 * size} x {size}, {iterations} iterations",
        contenders,
        tolerance=1e-6,
        settle=0.1,
    )


def direct(report: Report, size: int) -> None:
    a, ridge = kernel(size, torch.float64), 1e-2
    b = random(torch.randn, 1, size, 10)
    eye = torch.eye(size, dtype=torch.float64)
    peer = "torch cholesky" if on_gpu() else "scipy cholesky"

    def cholesky(value: float) -> Any:
        if on_gpu():
            return torch.cholesky_solve(b, torch.linalg.cholesky(a + value * eye))
        damped = (a + value * eye).numpy()
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(damped), b.numpy())

    report.compare(
        f"Cholesky, {size} x {size}, 10 right-hand sides, residual 1e-10",
        {
            "jacpot": lambda: jacpot.solve(a, b, damping=ridge, tol=1e-10).raise_if_failed().x,
            peer: lambda: cholesky(ridge),
        },
        tolerance=1e-7,
        min_rounds=3,
    )
    ridges = numpy.logspace(-2, 2, 20)

    def path() -> list[torch.Tensor]:
        return [s.raise_if_failed().x for s in solve_path(a, b, ridges, tol=1e-8)]

    report.compare(
        f"path of 20 ridges, {size} x {size}, 10 right-hand sides, residual 1e-8",
        {"jacpot": path, peer: lambda: [cholesky(ridge) for ridge in ridges]},
        tolerance=1e-5,
        min_rounds=1,
        budget=1.0,
    )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    set_up(arguments)
    report = Report("Dense systems")
    conjugate_gradients(report, 300 if arguments.quick else 1000)
    indefinite(report, 300 if arguments.quick else 1000)
    least_squares(report, 200 if arguments.quick else 1000)
    direct(report, 500 if arguments.quick else 4000)
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
