"""A whole training step, 784-2048-2048-10: sparse layers against dense weights with a mask.

python bench/bench_sparse_training.py --json runs/sparse_training.json
"""

from __future__ import annotations

import itertools

import torch
from harness import Report, max_error, parser
from torch import nn
from torch.nn import functional

import jacpot


class MaskedDense(nn.Module):
    """What one writes in plain PyTorch."""

    def __init__(self, linear: nn.Linear, mask: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", mask.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with the masked weight."""
        return functional.linear(x, self.weight * self.mask, self.bias)


def contenders(zeros: float, batch: int, sizes: list[int]) -> dict:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(fan_in, out)] + [nn.ReLU()] * (i + 2 < len(sizes))
    network = nn.Sequential(*layers)
    masks = {
        f"{i}.weight": torch.rand(layer.weight.shape) < 1 - zeros
        for i, layer in enumerate(network)
        if isinstance(layer, nn.Linear)
    }
    sparse = jacpot.nn.sparsify(network, masks)
    dense = nn.Sequential(
        *(
            MaskedDense(layer, masks[f"{i}.weight"]) if isinstance(layer, nn.Linear) else layer
            for i, layer in enumerate(network)
        )
    )
    x, target = torch.randn(batch, sizes[0]), torch.randint(0, sizes[-1], (batch,))

    def step_of(module: nn.Module):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(module(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    numbers = {
        "dense parameters": sum(p.numel() for p in dense.parameters()),
        "sparse parameters": sum(p.numel() for p in sparse.parameters()),
    }
    print(f"{zeros:.0%} zeros: {numbers}")
    return {"jacpot": step_of(sparse), "dense x mask": step_of(dense)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=256)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = [64, 256, 256, 10] if arguments.quick else [784, 2048, 2048, 10]
    report = Report(
        f"training step {'-'.join(map(str, sizes))}, batch {arguments.batch}, Adam, "
        f"{arguments.threads} threads"
    )
    for zeros in (0.8, 0.9, 0.95, 0.99):
        report.compare(
            f"{zeros:.0%} zeros",
            contenders(zeros, arguments.batch, sizes),
            agree=max_error,  # the loss of the first step, from the same start
            budget=1.0 if arguments.quick else 5.0,
        )
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
