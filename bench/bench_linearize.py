"""Time a linearized network's forward pass against `torch.func.jvp`, written out by hand.

python bench/bench_linearize.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from bench_ntk import cnn, mlp
from harness import Report, parser, set_up
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacpot


class VisionTransformer(nn.Module):
    """Four encoder layers over the 64 patches of an image of 32 x 32."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 64, width) / 8)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Give the scores of ten classes."""
        tokens = self.patches(x).flatten(2).mT + self.position
        scores: Tensor = self.head(self.encoder(tokens).mean(1))
        return scores


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(784, 300, 100, 10), (1000, 784)),
    "mlp, one example": (lambda: mlp(784, 300, 100, 10), (1, 784)),
    "cnn": (cnn, (100, 3, 32, 32)),
    "vit": (VisionTransformer, (64, 3, 32, 32)),
}


def expanded(module: nn.Module, x: Tensor, delta: dict[str, Tensor]) -> Tensor:
    point = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (x,))

    value, change = jvp(outputs, (point,), (delta,))
    total: Tensor = value + change
    return total


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    arguments = options.parse_args()
    set_up(arguments)
    report = Report("f(x) + J(x) Δ, float32", path=arguments.json)
    for case in arguments.case or CASES:
        make, shape = CASES[case]
        torch.manual_seed(0)
        module, x = make(), torch.randn(*shape)
        lin = jacpot.linearize(module)
        delta = {name: 0.01 * torch.randn_like(p) for name, p in module.named_parameters()}
        lin.set_delta(delta)

        by_hand = functools.partial(expanded, module, x, delta)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the one that has a forward mode
            report.compare(
                case,
                {"jacpot": functools.partial(lin, x), "torch.func": by_hand},
                max_rounds=20 if arguments.quick else 200,
            )
    report.show()


if __name__ == "__main__":
    main()
