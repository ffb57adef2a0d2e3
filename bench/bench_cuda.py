"""The kernels on a GPU against cuBLAS, cuSPARSE and ``torch.func``.

    python bench/bench_cuda.py --json runs/cuda.json --case sparse --case gram

Times are of CUDA events. Inputs take turns among copies that together exceed the L2 cache. Every
figure is written as soon as it is there. Without a GPU, or without CUDA in the build, nothing is
timed and the reason is printed; ``--device cpu`` runs the same comparisons on the CPU, small, to
check this script.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_jacobian import products
from bench_ntk import resnet18
from harness import CACHE_BYTES, Report, max_error, parser, set_up, wall_clock

import jacpot
from jacpot.ops import jacobian as ops

try:
    import cupy
    import cupyx.scipy.sparse
except ImportError:  # then PyTorch's way to cuSPARSE alone is the peer
    cupy = None


def rotating(make: Callable[[], Any], size: int, device: str) -> Callable[[], Any]:
    """Give one of several copies of an input at each call."""
    copies = 1 if device == "cpu" else min(8, CACHE_BYTES // max(1, size) + 2)
    return itertools.cycle([make() for _ in range(copies)]).__next__


def dense_rate(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    """What everything else is measured by: plain products, and a copy."""
    n = 256 if small else 8192
    kinds = {"float32": (torch.float32, "highest"), "TF32": (torch.float32, "high")}
    for name, (dtype, precision) in {**kinds, "bfloat16": (torch.bfloat16, "highest")}.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        call = {f"torch {name}": lambda a=a, b=b: a @ b}
        report.compare(f"dense {n}, {name}", call, flops=2.0 * n**3, **timing)
    torch.set_float32_matmul_precision("highest")
    a, b = (torch.empty(1 << 16 if small else 1 << 30, device=device) for _ in range(2))
    report.compare(f"copy of {a.nbytes >> 20} MiB", {"torch": lambda: b.copy_(a)}, **timing)


def by_cupy(weight: Any) -> Callable[[Any], Any] | None:
    """The product with a sparse weight by cuSPARSE, as CuPy calls it."""
    if cupy is None or not weight.is_cuda or weight.dtype != torch.float32:
        return None
    csr = cupyx.scipy.sparse.csr_matrix(cupy.from_dlpack(weight))
    return lambda x: torch.from_dlpack(csr @ cupy.from_dlpack(x.T)).T


def able(contenders: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Leave out, and name, peers that refuse a dtype: figures of the others still come."""
    left = {}
    for name, call in contenders.items():
        try:
            call()
        except RuntimeError as error:
            if name == "jacpot":
                raise
            print(f"{name} is left out: {str(error).splitlines()[0]}", flush=True)
        else:
            left[name] = call
    return left


def sparse_products(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    sizes = [(64, 128)] if small else [(4096, 1024), (8192, 2048)]
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    for dtype, (width, n), zeros in itertools.product(dtypes, sizes, [0.98, 0.9, 0.95, 0.99]):
        mask = torch.rand(width, width, device=device) >= zeros
        pattern = jacpot.Pattern(mask)
        weight = torch.randn(width, width, device=device) * mask
        dense, values = weight.to(dtype), pattern.compress(weight).to(dtype)
        csr, cusparse = dense.to_sparse_csr(), by_cupy(dense)
        element = dense.element_size()
        x = rotating(
            lambda n=n, width=width, dtype=dtype: torch.randn(n, width, device=device).to(dtype),
            n * width * element,
            device,
        )
        kept = pattern.nnz * n
        few = torch.randn(n, width, device=device).to(dtype)
        error = max_error(
            jacpot.masked_matmul(few, values, pattern, method="sparse").double(),
            few.double() @ dense.double().T,
        )
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), error
        report.compare(
            f"forward {width}, N={n}, {zeros:.0%} zeros, {dtype}",
            able(
                {
                    "jacpot": lambda x=x, v=values, p=pattern: jacpot.masked_matmul(
                        x(), v, p, method="sparse"
                    ),
                    "dense": lambda x=x, w=dense: x() @ w.T,
                    "sparse CSR": lambda x=x, w=csr: (w @ x().T).T,
                    **({"CuPy CSR": lambda x=x, f=cusparse: f(x())} if cusparse else {}),
                }
            ),
            agree=None,  # inputs take turns
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
    # An iteration reads the matrix once; a copy reads and writes it.
    report.compare(
        f"{iterations} CG iterations, N={n}, {columns} right-hand sides",
        {
            "jacpot": lambda: jacpot.solve(matrix, b, method="cg", tol=1e-30, max_iter=iterations),
            f"{iterations} times half a copy": lambda: [
                copy.copy_(matrix) for _ in range(iterations // 2)
            ],
        },
        agree=None,
        **timing,
    )


def jacobian_products(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    for n in [50] if small else [1000, 10_000]:
        products(report, n, timing["budget"])
        products(report, n, timing["budget"], density=0.1)


def first_logit(outputs: Any) -> Any:
    return outputs[:, :1]


def resnet_kernel(report: Report, device: str, small: bool, timing: dict[str, Any]) -> None:
    """The scalar kernel of a part of 60,000 images, and what that makes for all of them.

    Of one logit, as the published run of 43 minutes on four A100s (github.com/aw31/empirical-ntks),
    and summed over ten.
    """
    examples, everything = (4 if small else 10_000), 60_000
    kinds: list[tuple[str, Any, Any]] = [("one logit", first_logit, "tf32")]
    if not small:
        kinds += [("one logit", first_logit, "exact"), ("sum over ten logits", None, "tf32")]
    for name, output, precision in kinds:
        torch.manual_seed(0)
        network = resnet18()
        for n in [2, examples] if small else [500, 2_000, examples]:  # few are a warm-up
            x = torch.randn(n, 3, 32, 32)
            call = functools.partial(
                jacpot.ntk,
                network,
                x,
                outputs="trace",
                out=torch.empty(n, n, device="cpu"),
                output=output,
                precision=precision,
            )
            seconds = wall_clock(call)
            minutes = seconds * (everything / n) ** 2 / 60
            report.add(
                f"ResNet-18, {name}, {n} examples, {precision}",
                {"jacpot": seconds},
                note=f"{minutes:.1f} minutes for {everything} x {everything}, extrapolated",
            )


CASES: dict[str, Callable[[Report, str, bool, dict[str, Any]], None]] = {
    "dense": dense_rate,
    "sparse": sparse_products,
    "gram": gram_matrices,
    "solve": kernel_solve,
    "jacobian": jacobian_products,
    "resnet": resnet_kernel,
}


def main() -> int:
    options = parser(__doc__, device="cuda")
    options.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    options.add_argument("--budget", type=float, default=2.0, help="seconds of a comparison")
    arguments = options.parse_args()
    set_up(arguments)
    device = arguments.device
    small = arguments.quick or device == "cpu"
    timing = {"budget": 0.2 if small else arguments.budget}
    report = Report(f"CUDA kernels on {device}", path=arguments.json)
    for case in arguments.case or CASES:
        CASES[case](report, device, small, timing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
