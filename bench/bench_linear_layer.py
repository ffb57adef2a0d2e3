"""Time the products of a linear layer against PyTorch's: few examples, and signals with zeros.

python bench/bench_linear_layer.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Report, parser, set_up
from torch import Tensor

from jacpot.ops import linear_layer

COPIES = 4  # of a weight, taken in turn: in a network other layers have pushed it out of the cache


def main() -> None:
    options = parser(__doc__).parse_args()
    set_up(options)
    torch.manual_seed(0)
    report = Report("Products of a linear layer, float32", path=options.json)
    for n, i, o in [(1, 2048, 2048), (16, 3072, 2048), (16, 2048, 2048), (64, 2048, 2048)]:
        x, weights = torch.randn(n, i), [torch.randn(o, i) for _ in range(COPIES)]
        report.compare(
            f"forward, {n} examples, {i} to {o}",
            {
                "jacpot": in_turn(weights, lambda w, x=x: linear_layer.forward(x, w)),
                "torch": in_turn(weights, lambda w, x=x: F.linear(x, w)),
            },
            agree=None,
        )
    for n, k, o, i in [(16, 8, 2048, 2048), (200, 10, 100, 300), (500, 10, 512, 512)]:
        for zeros in (0.0, 0.5):
            signals = torch.randn(n, k, o) * (torch.rand(n, 1, o) >= zeros)
            weights = [torch.randn(o, i) for _ in range(COPIES)]
            report.compare(
                f"backward, {n} x {k} signals, {o} to {i}, {zeros:.0%} zeros",
                {
                    "jacpot": in_turn(weights, lambda w, s=signals: linear_layer.backward(s, w)),
                    "torch": in_turn(weights, lambda w, s=signals: s @ w),
                },
                agree=None,
            )
    report.show()


def in_turn(weights: list[Tensor], product: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    turns = itertools.cycle(weights)
    return lambda: product(next(turns))


if __name__ == "__main__":
    main()
