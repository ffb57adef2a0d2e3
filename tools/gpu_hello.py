"""Say what the GPU is, and whether one call of each kind gives there what it gives on the CPU."""

from __future__ import annotations

import sys

import torch

import jacpot


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((got.cpu().double() - expected.double()).abs().max() / expected.abs().max())


def main() -> int:
    """Print errors; not zero where one is too large."""
    print(jacpot.build_info())
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU")
        return 1
    print(torch.cuda.get_device_properties(0))
    torch.manual_seed(0)
    mask = torch.rand(500, 700) < 0.1
    x, weight = torch.randn(300, 700), torch.randn(500, 700) * mask
    pattern = jacpot.Pattern(mask.cuda())
    product = jacpot.masked_matmul(
        x.cuda(), pattern.compress(weight.cuda()), pattern, method="sparse"
    )
    errors = {"product": error(product, x @ weight.T)}
    few = torch.rand(500, 700) < 0.02
    pattern, x16 = jacpot.Pattern(few.cuda()), x.bfloat16()
    values = torch.randn(pattern.nnz).bfloat16()
    product = jacpot.masked_matmul(x16.cuda(), values.cuda(), pattern, method="sparse")
    expected = x16.double() @ torch.zeros(500, 700).double().masked_scatter(few, values.double()).T
    errors["product in 16 bits"] = error(product, expected) / 1e2  # it is rounded to eight bits
    network = torch.nn.Sequential(torch.nn.Linear(700, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    kernel = jacpot.ntk(network, x[:90])
    network.cuda()
    for precision, scale in (("exact", 1.0), ("3xtf32", 1.0), ("tf32", 1e3)):
        there = jacpot.ntk(network, x[:90].cuda(), precision=precision)
        errors[f"kernel, {precision}"] = error(there, kernel) / scale
    root, b = torch.randn(400, 600), torch.randn(400, 3)
    matrix = root @ root.T
    for method in ("cg", "block_cg", "cholesky"):
        solution = jacpot.solve(matrix.cuda(), b.cuda(), damping=1.0, method=method)
        print(method, solution.status, solution.iterations)
        expected = torch.linalg.solve(matrix.double() + torch.eye(400), b.double())
        errors[method] = error(solution.x, expected)
    for name, size in errors.items():
        print(f"{name}: error {size:.1e}")
    return int(not all(size < 1e-4 for size in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
