"""A training step and inference, 784-2048-2048-10: sparse layers against dense ones with a mask.

Memory is the peak of a process that steps, above what it held before there was a network:
parameters, gradients, moments, masks or patterns, activations and workspace (Linux).

python bench/bench_sparse_training.py --json runs/sparse_training.json
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
from pathlib import Path

import torch
from harness import Report, max_error, on_gpu, parser, resident, set_up
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


SMALL, FULL = [64, 256, 256, 10], [784, 2048, 2048, 10]


def networks(zeros: float, sizes: list[int]) -> dict[str, nn.Module]:
    """Build the same network twice: with sparse layers, and dense with masks."""
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
    dense = nn.Sequential(
        *(
            MaskedDense(layer, masks[f"{i}.weight"]) if isinstance(layer, nn.Linear) else layer
            for i, layer in enumerate(network)
        )
    )
    return {"jacpot": jacpot.nn.sparsify(network, masks), "dense x mask": dense}


def batch_of(size: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, sizes[0]), torch.randint(0, sizes[-1], (size,))


def step_of(module: nn.Module, x: torch.Tensor, target: torch.Tensor):
    """Forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def inference_of(module: nn.Module, x: torch.Tensor):
    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return module(x)

    return infer


def peak_memory(name: str, zeros: float, batch: int, sizes: list[int], answer) -> None:
    """Put the peak while one contender steps, in MiB above what was held without it."""
    x, target = batch_of(batch, sizes)
    step_of(networks(0.5, SMALL).pop(name), *batch_of(batch, SMALL))()  # code and threads
    before = resident("VmRSS")
    module = networks(zeros, sizes).pop(name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step = step_of(module, x, target)
    for _ in range(5):
        step()
    answer.put(resident("VmHWM") - before)


def peak_on_gpu(name: str, zeros: float, batch: int, sizes: list[int]) -> float:
    """Peak of the GPU's memory while one contender steps, in MiB above what was held before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = step_of(networks(zeros, sizes).pop(name), *batch_of(batch, sizes))
    step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report_memory(batch: int, sizes: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    for name, zeros in (("dense x mask", 0.95), ("jacpot", 0.95), ("jacpot", 0.99)):
        if on_gpu():
            peak = peak_on_gpu(name, zeros, batch, sizes)
            print(f"peak memory of a step at {zeros:.0%} zeros, {name}: {peak:.0f} MiB")
            continue
        answer = context.Queue()
        process = context.Process(target=peak_memory, args=(name, zeros, batch, sizes, answer))
        process.start()
        print(f"peak memory of a step at {zeros:.0%} zeros, {name}: {answer.get():.0f} MiB")
        process.join()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=256)
    arguments = options.parse_args()
    set_up(arguments)
    sizes = SMALL if arguments.quick else FULL
    report = Report(
        f"{'-'.join(map(str, sizes))}, batch {arguments.batch}, Adam, {arguments.threads} threads"
    )
    x, target = batch_of(arguments.batch, sizes)
    budget = 1.0 if arguments.quick else 5.0
    for zeros in (0.8, 0.9, 0.95, 0.99):
        built = networks(zeros, sizes)
        report.compare(
            f"inference {zeros:.0%} zeros",
            {name: inference_of(module, x) for name, module in built.items()},
            agree=max_error,
            budget=budget,
        )
        report.compare(
            f"step {zeros:.0%} zeros",
            {name: step_of(module, x, target) for name, module in built.items()},
            agree=max_error,  # the loss of the first step, from the same start
            budget=budget,
        )
    report_memory(arguments.batch, sizes)
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
