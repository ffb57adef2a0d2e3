"""Sparse masked product against dense with a mask, PyTorch's CSR and SciPy's CSR.

python bench/bench_masked_matmul.py --json runs/masked_matmul.json --plot runs/masked_matmul.png
"""

from __future__ import annotations

import warnings
from pathlib import Path

import scipy.sparse
import torch
from harness import Report, on_gpu, parser, set_up
from torch.nn import functional

import jacpot

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def problem(n: int, size: int, zeros: float) -> dict:
    torch.manual_seed(0)
    mask = torch.rand(size, size) < 1 - zeros
    pattern = jacpot.Pattern(mask)
    weight = torch.randn(size, size) * mask
    return {
        "mask": mask.float(),
        "pattern": pattern,
        "weight": weight,
        "values": pattern.compress(weight),
        "x": torch.randn(n, size),
        "dy": torch.randn(n, size),
    }


def forward(n: int, size: int, zeros: float) -> dict:
    """Contenders for Y = X Wᵀ; every one starts from the layout that suits it best."""
    p = problem(n, size, zeros)
    x, values, pattern, weight, mask = (p[k] for k in ("x", "values", "pattern", "weight", "mask"))
    columns = x.t().contiguous()
    by_feature = columns.t()
    csr = weight.to_sparse_csr()
    contenders = {
        "jacpot": lambda: jacpot.masked_matmul(x, values, pattern, method="sparse"),
        "jacpot feature": lambda: jacpot.masked_matmul(
            by_feature, values, pattern, layout="feature", method="sparse"
        ),
        "dense x mask": lambda: functional.linear(x, weight * mask),
        "dense, masked before": lambda: functional.linear(x, weight),
        "torch CSR": lambda: (csr @ columns).t(),
    }
    if not on_gpu():
        other = scipy.sparse.csr_array(weight.numpy())
        contenders["SciPy CSR"] = lambda: torch.from_numpy(other @ columns.numpy()).t()
    return contenders


def backward(n: int, size: int, zeros: float) -> dict:
    """Contenders for dX and dW together."""
    p = problem(n, size, zeros)
    x, dy, values, pattern, weight, mask = (
        p[k] for k in ("x", "dy", "values", "pattern", "weight", "mask")
    )
    run = torch.ops.jacpot.masked_matmul_backward
    columns, d_columns = x.t().contiguous(), dy.t().contiguous()
    csr, transposed = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()
    zero = torch.sparse_csr_tensor(
        csr.crow_indices(), csr.col_indices(), torch.zeros_like(csr.values()), csr.shape
    )

    def dense() -> tuple:
        return dy @ (weight * mask), pattern.compress((dy.t() @ x) * mask)

    def sparse() -> tuple:
        sampled = torch.sparse.sampled_addmm(zero, d_columns, x)
        return (transposed @ d_columns).t(), sampled.values()

    return {
        "jacpot": lambda: run(dy, x, values, pattern.block, True, True),
        "jacpot feature": lambda: run(
            d_columns.t(), columns.t(), values, pattern.block, True, True
        ),
        "dense x mask": dense,
        "torch CSR": sparse,
    }


def plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in report.rows if r["case"].startswith("sweep")]
    zeros = [float(r["case"].split()[-1].rstrip("%")) for r in rows]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(zeros, [r["ratio"]["dense x mask"] for r in rows], "o-", label="forward")
    axes.axhline(1, color="gray", lw=0.8)
    axes.set(xlabel="zeros [%]", ylabel="speed-up over dense with mask", yscale="log")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, help="speed-up over sparsity, as an image")
    options.add_argument("--isa", help="force an instruction set")
    arguments = options.parse_args()
    set_up(arguments)
    if arguments.isa:
        assert jacpot._backend.core.force_isa(arguments.isa), arguments.isa
    budget = 0.3 if arguments.quick else 1.5
    report = Report(f"masked_matmul, {arguments.threads} threads, {arguments.device}, float32")
    sizes = [(256, 1024)] if arguments.quick else [(256, 1024), (1024, 4096)]
    for n, size in sizes:
        for zeros in (0.9, 0.99):
            flops = 2 * (1 - zeros) * size * size * n
            name = f"N={n} {size}x{size} {zeros:.0%}"
            report.compare(f"forward {name}", forward(n, size, zeros), flops=flops, budget=budget)
            report.compare(
                f"backward {name}", backward(n, size, zeros), flops=2 * flops, budget=budget
            )
    for n in () if arguments.quick else (1, 8):
        report.compare(f"forward N={n} 4096x4096 90%", forward(n, 4096, 0.9), budget=budget)
    for zeros in (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
        contenders = forward(256, 1024, zeros)
        contenders.pop("SciPy CSR", None)
        flops = 2 * (1 - zeros) * 1024 * 1024 * 256
        report.compare(f"sweep N=256 1024x1024 {zeros:.0%}", contenders, flops=flops, budget=0.4)
    report.show()
    if arguments.json:
        report.save(arguments.json)
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
