"""Time products with, and rows of, the Jacobian of a module.

- ``J v`` and ``Jᵀ u`` from captured factors, as an iterative solver asks for them, against
  ``torch.func.jvp`` and a ``torch.func.vjp`` that is set up once;
- the same of a network under a random mask of one weight in ten;
- per-example gradients of a loss, from the module to the result.

BackPACK and Opacus are left out where they are not installed.

    python bench/bench_jacobian.py --case products-1000
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from unittest.mock import patch

import torch
from bench_ntk import masked_module, mlp
from harness import Report, parser, set_up
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import jacpot
from jacpot.ops import jacobian as ops
from jacpot.ops import jacobian_gram, jacobian_windows
from jacpot.ops.jacobian_windows import Windows


def products(report: Report, n: int, budget: float, density: float | None = None) -> None:
    torch.manual_seed(0)
    module, x = mlp(784, 300, 100, 10), torch.randn(n, 784)
    masks = None if density is None else masked_module(module, density)
    j = jacpot.jacobian(module, x, mask=masks)
    v, u = torch.randn(j.n_parameters), torch.randn(j.n_examples, j.n_outputs)
    theta = {k: p.detach() for k, p in module.named_parameters()}
    direction = j.unflatten(v)

    def network(p: dict[str, Tensor]) -> Tensor:
        if masks is not None:
            p = {k: t * masks[k] if k in masks else t for k, t in p.items()}
        return functional_call(module, p, (x,))

    _, pull = vjp(network, theta)

    def ours() -> tuple[Tensor, Tensor]:
        return j @ v, j.T @ u

    def peer() -> tuple[Tensor, Tensor]:
        return jvp(network, (theta,), (direction,))[1], j.flatten(pull(u)[0])

    name = f"J v, J^T u, N={n}" + ("" if density is None else ", 90% zeros")
    report.compare(name, {"jacpot": ours, "torch.func": peer}, budget=budget)


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def gradients_by_func(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    theta = {k: p.detach() for k, p in module.named_parameters()}

    def loss(p: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(module, p, (xi[None],)), yi[None])

    parts = vmap(grad(loss), (None, 0, 0))(theta, x, y)
    return torch.cat([g.flatten(1) for g in parts.values()], 1)


def by_backpack(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor] | None:
    try:
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad
    except ImportError as error:
        print(f"BackPACK is left out: {error}")
        return None
    import copy

    own = extend(copy.deepcopy(module))
    loss_of = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Tensor:
        loss = loss_of(own(x), y)
        with backpack(BatchGrad()):
            loss.backward()
        return torch.cat([p.grad_batch.flatten(1) for p in own.parameters()], 1)

    return run


def by_opacus(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor] | None:
    try:
        from opacus import GradSampleModule
    except ImportError as error:
        print(f"Opacus is left out: {error}")
        return None
    import copy

    own = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")

    def run() -> Tensor:
        for p in own.parameters():
            p.grad_sample = None
        nn.functional.cross_entropy(own(x), y, reduction="sum").backward()
        return torch.cat([p.grad_sample.flatten(1) for p in own.parameters()], 1)

    return run


class Loss(nn.Module):
    """A network with its loss, ``(x, y) -> (N, 1)``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Give the loss of every example."""
        return nn.functional.cross_entropy(self.module(x), y, reduction="none")[:, None]


def gradients(report: Report, name: str, module: nn.Module, x: Tensor, budget: float) -> None:
    y = torch.randint(0, 10, (len(x),))
    with_loss = Loss(module)
    contenders: dict[str, Callable[[], Tensor]] = {
        "jacpot": lambda: jacpot.jacobian(with_loss, (x, y)).dense()[:, 0],
        "torch.func": lambda: gradients_by_func(module, x, y),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for peer, make in (("BackPACK", by_backpack), ("Opacus", by_opacus)):
            call = make(module, x, y)
            if call is not None:
                contenders[peer] = call
        report.compare(f"gradients, {name}, N={len(x)}", contenders, budget=budget)


def positions(report: Report, budget: float) -> None:
    """Time both ways of a layer with positions; the cost model is right where its choice wins."""
    n, k = 48, 10
    for t, i, o in [(4, 256, 256), (16, 256, 256), (64, 576, 64), (64, 1152, 128), (256, 144, 16)]:
        torch.manual_seed(0)
        block = ops.Factors(torch.randn(n, t, 1, i), torch.randn(n, k, t, 1, o))

        def way(pairwise: bool, block: ops.Factors = block) -> Tensor:
            with patch.object(jacobian_gram, "pairwise_is_cheaper", lambda *_: pairwise):
                return ops.gram([block], outputs="trace")

        choice = jacobian_gram.pairwise_is_cheaper(block, block, "trace", True)
        name = f"trace, N={n} K={k} T={t} I={i} O={o}, chosen: {'pairs' if choice else 'rows'}"
        ways = {"pairs": lambda way=way: way(True), "rows": lambda way=way: way(False)}
        report.compare(name, ways, budget=budget / 5)


def filtering(report: Report, budget: float) -> None:
    """Time both ways from a 3 x 3 convolution to its rows, with the channels and places of nets."""
    n, k = 8, 10
    for channels, side in [(16, 32), (32, 32), (64, 32), (128, 16), (256, 8)]:
        torch.manual_seed(0)
        seen = Windows(torch.randn(n, channels, side + 2, side + 2), (3, 3), (1, 1), (1, 1))
        signals = torch.randn(n, k, 1, channels, side * side).movedim(4, 2)

        def way(fewest: int, seen: Windows = seen, signals: Tensor = signals) -> Tensor:
            with patch.object(jacobian_windows, "FEWEST_PLACES", fewest):
                return seen.rows(signals)

        name = f"rows, N={n} K={k}, {channels} channels, {side}x{side}"
        ways = {"filtering": lambda way=way: way(0), "plain sums": lambda way=way: way(10**9)}
        report.compare(name, ways, budget=budget / 5)


CASES = (
    "products-1000",
    "products-10000",
    "masked-1000",
    "masked-10000",
    "positions",
    "filtering",
    "gradients",
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--case", action="append", choices=CASES, help="default: all")
    options.add_argument("--budget", type=float, default=8.0, help="seconds of a comparison")
    chosen = options.parse_args()
    set_up(chosen)
    budget = 1.0 if chosen.quick else chosen.budget
    report = Report("Jacobians, float32", path=chosen.json)
    for case in chosen.case or CASES:
        kind, _, n = case.partition("-")
        if kind == "products":
            products(report, int(n), budget)
        elif kind == "masked":
            products(report, int(n), budget, density=0.1)
        elif kind == "positions":
            positions(report, budget)
        elif kind == "filtering":
            filtering(report, budget)
        else:
            torch.manual_seed(0)
            gradients(
                report, "784-300-100-10", mlp(784, 300, 100, 10), torch.randn(256, 784), budget
            )
            gradients(report, "small CNN", small_cnn(), torch.randn(256, 1, 28, 28), budget)
    report.show()


if __name__ == "__main__":
    main()
