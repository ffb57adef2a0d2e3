"""Sparse convolution against PyTorch's dense one with a masked weight, forward and backward.

python bench/bench_masked_conv2d.py --json runs/masked_conv2d.json
"""

from __future__ import annotations

import torch
from harness import Report, parser, set_up
from torch.nn import functional

import jacpot
from jacpot.ops.masked_conv2d import masked_conv2d, window_of


def contenders(batch: int, channels: int, image: int, zeros: float, backward: bool) -> dict:
    """Contenders for a 3x3 convolution that keeps size and number of channels."""
    torch.manual_seed(0)
    mask = torch.rand(channels, channels, 3, 3) < 1 - zeros
    window = window_of(mask.shape, padding=1)
    pattern = jacpot.Pattern(window.flatten(mask))
    weight = torch.randn(mask.shape) * mask
    values = pattern.compress(window.flatten(weight)).requires_grad_()
    weight.requires_grad_()
    kept = mask.float()
    x = torch.randn(batch, channels, image, image, requires_grad=backward)

    def sparse() -> torch.Tensor:
        return masked_conv2d(x, values, pattern, window, method="sparse")

    def dense() -> torch.Tensor:
        return functional.conv2d(x, weight * kept, padding=1)

    if not backward:
        return {"jacpot": torch.no_grad()(sparse), "dense x mask": torch.no_grad()(dense)}
    ours, theirs = sparse(), dense()
    dy = torch.randn_like(ours)

    def kept_gradient() -> tuple:
        dx, dw = torch.autograd.grad(theirs, (x, weight), dy, retain_graph=True)
        return dx, pattern.compress(window.flatten(dw))

    return {
        "jacpot": lambda: torch.autograd.grad(ours, (x, values), dy, retain_graph=True),
        "dense x mask": kept_gradient,
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    set_up(arguments)
    report = Report(f"masked_conv2d 3x3, {arguments.threads} threads, float32")
    sizes = [(8, 32, 16)] if arguments.quick else [(32, 64, 32), (32, 128, 16), (32, 256, 8)]
    for batch, channels, image in sizes:
        for zeros in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
            for backward in (False, True):
                flops = 2 * (1 - zeros) * batch * (3 * channels * image) ** 2 * (1 + backward)
                report.compare(
                    f"{'backward' if backward else 'forward'} {batch}x{channels}x{image}² "
                    f"{zeros:.0%}",
                    contenders(batch, channels, image, zeros, backward),
                    flops=flops,
                    budget=0.3 if arguments.quick else 0.8,
                )
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
