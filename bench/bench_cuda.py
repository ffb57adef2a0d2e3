"""The kernels on a GPU against cuBLAS and cuSPARSE, through PyTorch.

    python bench/bench_cuda.py --json runs/cuda.json

Times are of CUDA events. Inputs take turns among copies that together exceed the L2 cache. Without
a GPU, or without CUDA in the build, nothing is timed and the reason is printed; ``--device cpu``
runs the same comparisons on the CPU, small, to check this script.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import CACHE_BYTES, Report, parser, set_up

import jacpot
from jacpot.ops import jacobian as ops


def rotating(make: Callable[[], Any], size: int, device: str) -> Callable[[], Any]:
    """Give one of several copies of an input at each call."""
    copies = 1 if device == "cpu" else min(8, CACHE_BYTES // max(1, size) + 2)
    return itertools.cycle([make() for _ in range(copies)]).__next__


def sparse_products(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    sizes = [(64, 128)] if small else [(4096, 1024), (8192, 2048)]
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    for (width, n), dtype, zeros in itertools.product(sizes, dtypes, [0.9, 0.95, 0.98, 0.99]):
        mask = torch.rand(width, width, device=device) >= zeros
        pattern = jacpot.Pattern(mask)
        weight = torch.randn(width, width, device=device) * mask
        dense, values = weight.to(dtype), pattern.compress(weight).to(dtype)
        csr = dense.to_sparse_csr()
        element = dense.element_size()
        x = rotating(
            lambda n=n, width=width, dtype=dtype: torch.randn(n, width, device=device).to(dtype),
            n * width * element,
            device,
        )
        kept = pattern.nnz * n
        report.compare(
            f"forward {width}, N={n}, {zeros:.0%} zeros, {dtype}",
            {
                "jacpot": lambda x=x, v=values, p=pattern: jacpot.masked_matmul(
                    x(), v, p, method="sparse"
                ),
                "dense": lambda x=x, w=dense: x() @ w.T,
                "sparse CSR": lambda x=x, w=csr: (w @ x().T).T,
            },
            agree=None if device != "cpu" else lambda a, b: float((a - b).abs().max()),
            flops=2 * kept,
            **timing,
        )
        dy = rotating(
            lambda n=n, width=width, dtype=dtype: torch.randn(n, width, device=device).to(dtype),
            n * width * element,
            device,
        )
        block = pattern.block
        report.compare(
            f"backward {width}, N={n}, {zeros:.0%} zeros, {dtype}",
            {
                "jacpot": lambda x=x, dy=dy, v=values, b=block: (
                    torch.ops.jacpot.masked_matmul_backward(dy(), x(), v, b, True, True)
                ),
                "dense": lambda x=x, dy=dy, w=dense, m=mask: (
                    dy() @ w,
                    (dy().T @ x())[m],
                ),
            },
            agree=None,
            flops=4 * kept,
            **timing,
        )


def on_tensor_cores(block: Any, out: Any) -> dict[str, Callable[[], Any]]:
    return {
        "jacpot 3xtf32": lambda: ops.gram([block], out=out, precision="3xtf32"),
        "jacpot tf32": lambda: ops.gram([block], out=out, precision="tf32"),
    }


def gram_matrices(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    k = 10
    n = 20 if small else 2000
    for width, zeros in itertools.product([32] if small else [256, 512, 1024], [0.0, 0.9]):
        a = torch.randn(n, 1, 1, width, device=device)
        s = torch.randn(n, k, 1, 1, width, device=device)
        mask = torch.rand(width, width, device=device) >= zeros
        pattern = jacpot.Pattern(mask) if zeros else None
        block = ops.Factors(a, s, pattern)
        out = torch.empty(n, k, n, k, device=device)

        def products(a: Any = a, s: Any = s, out: Any = out) -> Any:
            left = (a[:, 0, 0] @ a[:, 0, 0].T)[:, None, :, None]
            rows = s.reshape(n * k, -1)
            return torch.mul(left, (rows @ rows.T).view(n, k, n, k), out=out)

        def panels(block: Any = block, out: Any = out) -> Any:
            rows = ops.dense([block]).reshape(n * k, -1)
            return torch.mm(rows, rows.T, out=out.view(n * k, n * k))

        peer = products if pattern is None else panels
        fits = pattern is None or n * k * pattern.nnz * 4 < 40 << 30
        report.compare(
            f"kernel, width {width}, N·K={n * k}, {zeros:.0%} zeros",
            {
                "jacpot": lambda b=block, out=out: ops.gram([b], out=out),
                **(on_tensor_cores(block, out) if device != "cpu" else {}),
                **({"torch": peer} if fits else {}),
            },
            agree=None,
            **timing,
        )


def kernel_solve(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    n, columns, iterations = (200 if small else 16_384), 10, 24
    factor = torch.randn(n, 2 * n, device=device) / n**0.5
    matrix = factor @ factor.T
    b = torch.randn(n, columns, device=device)
    copy = torch.empty_like(matrix)
    report.compare(
        f"{iterations} CG iterations, N={n}, {columns} right-hand sides",
        {
            "jacpot": lambda: jacpot.solve(matrix, b, method="cg", tol=1e-30, max_iter=iterations),
            "one copy of the matrix": lambda: copy.copy_(matrix),
        },
        agree=None,
        **timing,
    )


def main() -> int:
    arguments = parser(__doc__, device="cuda").parse_args()
    set_up(arguments)
    device = arguments.device
    small = arguments.quick or device == "cpu"
    timing = {"budget": 0.2 if small else 3.0}
    report = Report(f"CUDA kernels on {device}")
    sparse_products(report, device, small, timing)
    gram_matrices(report, device, small, timing)
    kernel_solve(report, device, small, timing)
    report.show()
    if arguments.json:
        report.save(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
